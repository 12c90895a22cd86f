"""Adapters by the name of a repository."""

import functools
import re

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from deltatune import LoraConfig, PeftConfig, PeftModel, load_peft_weights
from deltatune.errors import FormatError, IntegrityError, UnsafeError
from tests.core.test_storage import INPUTS, WEIGHTS, adapted
from tests.core.tiny import logits, tiny
from tests.hub.server import TOKEN


@pytest.fixture
def folder(tmp_path):
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def load(name, hub, **options):
    return PeftModel.from_pretrained(tiny("llama"), name, endpoint=hub.url, **options)


def same(model, seed=0, **options):
    return torch.equal(logits(model, INPUTS), logits(adapted(seed, **options), INPUTS))


def test_a_name_loads_what_the_folder_does(hub, folder, tmp_path):
    hub.add("someone/adapter", folder)
    assert same(load("someone/adapter", hub))
    model = adapted(1)
    model.load_adapter("someone/adapter", "second", endpoint=hub.url)
    model.set_adapter("second")
    assert same(model)
    config = PeftConfig.from_pretrained("someone/adapter", endpoint=hub.url)
    assert isinstance(config, LoraConfig) and config.r == 4
    tensors = load_peft_weights("someone/adapter", endpoint=hub.url)
    assert tensors.keys() == load_file(folder / WEIGHTS).keys()
    assert (tmp_path / "cache" / "models--someone--adapter").is_dir()


def test_a_revision_is_a_branch_or_a_commit(hub, folder, tmp_path):
    repo = hub.add("someone/adapter", folder)
    first = repo.refs["main"]
    adapted(1).save_pretrained(tmp_path / "other")
    repo.add_folder(tmp_path / "other", "main")
    repo.refs["old"] = first
    assert same(load("someone/adapter", hub), 1)
    assert same(load("someone/adapter", hub, revision="old")) and same(load("someone/adapter", hub, revision=first))
    config = PeftConfig.from_pretrained("someone/adapter", revision="old", endpoint=hub.url)
    assert config.revision is None, "the config's revision is that of the base"


def test_config_and_tensors_come_from_one_commit_though_the_branch_moves_in_between(hub, folder, tmp_path, monkeypatch):
    repo = hub.add("someone/adapter", folder)
    adapted(1, r=2).save_pretrained(tmp_path / "other")
    download = huggingface_hub.hf_hub_download

    @functools.wraps(download)
    def moving(name, file, **options):
        found = download(name, file, **options)
        repo.add_folder(tmp_path / "other", "main")
        return found

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", moving)
    assert same(load("someone/adapter", hub))


def test_a_subfolder_is_read_and_nothing_outside_of_it(hub, tmp_path):
    model = adapted()
    model.add_adapter("inner", LoraConfig(r=2))
    model.save_pretrained(tmp_path / "both")
    hub.add("someone/both", tmp_path / "both")
    assert load("someone/both", hub, subfolder="inner").peft_config["default"].r == 2
    for outside in ("../x", "/etc", "a/../../b", "a\\b"):
        with pytest.raises(UnsafeError, match="leads out of"):
            load("someone/both", hub, subfolder=outside)


def test_a_private_repository_opens_with_its_token(hub, folder):
    hub.add("someone/secret", folder, private=True)
    with pytest.raises(FormatError, match=r"no such repository, or it is private; .* pass token="):
        load("someone/secret", hub)
    assert same(load("someone/secret", hub, token=TOKEN, force_download=True))
    assert same(load("someone/secret", hub, use_auth_token=TOKEN))


def test_what_was_fetched_once_needs_no_network(hub, folder, tmp_path, monkeypatch):
    hub.add("someone/adapter", folder)
    load("someone/adapter", hub, cache_dir=tmp_path / "mine")
    hub.requests.clear()
    assert same(load("someone/adapter", hub, cache_dir=tmp_path / "mine", local_files_only=True))
    with pytest.raises(FormatError, match="not in the local cache, and downloads are switched off"):
        load("someone/adapter", hub, local_files_only=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert same(load("someone/adapter", hub, cache_dir=tmp_path / "mine"))
    with pytest.raises(FormatError, match="HF_HUB_OFFLINE"):
        load("someone/other", hub)
    assert hub.requests == []


def test_force_download_asks_again(hub, folder, tmp_path):
    hub.add("someone/adapter", folder)
    load("someone/adapter", hub)
    hub.requests.clear()
    load("someone/adapter", hub)
    assert [line for line in hub.requests if line.startswith("GET")] == []
    load("someone/adapter", hub, force_download=True)
    assert len([line for line in hub.requests if line.startswith("GET")]) == 2


@pytest.mark.parametrize(
    "name",
    [
        "./x",
        "/x",
        "a/b/c",
        "x\\y",
        "a\\b/c",
        "~/x",
        "a/b/",
        "x",
        "../a",
        "a/..",
        "a//b",
        ".a/b",
        "a/b.git",
        "a b/c",
        "",
    ],
)
def test_what_looks_like_a_path_is_never_sent_to_the_network(hub, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for ask in (
        lambda: load(name, hub),
        lambda: adapted().load_adapter(name, "second", endpoint=hub.url),
        lambda: PeftConfig.from_pretrained(name, endpoint=hub.url),
        lambda: load_peft_weights(name, endpoint=hub.url),
    ):
        with pytest.raises(FormatError) as caught:
            ask()
        assert (name or ".") in str(caught.value) and "\n" not in str(caught.value)
    assert hub.requests == []


def test_a_path_object_is_a_path(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from pathlib import Path

    with pytest.raises(FormatError, match="does not exist"):
        load(Path("someone/adapter"), hub)
    assert hub.requests == []


def test_a_local_folder_goes_before_a_repository_of_its_name(hub, folder, tmp_path, monkeypatch):
    hub.add("someone/adapter", folder)
    monkeypatch.chdir(tmp_path)
    adapted(1).save_pretrained("someone/adapter")
    assert same(load("someone/adapter", hub), 1) and hub.requests == []
    (tmp_path / "someone" / "empty").mkdir()
    with pytest.raises(FormatError, match=r"someone/empty has no adapter_config.json"):
        load("someone/empty", hub)
    assert hub.requests == []


def test_errors_of_the_network_say_what_was_tried_and_what_to_do(hub, folder):
    hub.add("someone/adapter", folder)
    cases = [
        ("someone/nothing", {}, "no such repository"),
        ("someone/adapter", {"revision": "v9"}, "no revision 'v9'; check revision"),
        ("someone/adapter", {"subfolder": "deep"}, "no such file; it is no adapter"),
    ]
    base = tiny("llama")
    for name, options, words in cases:
        with pytest.raises(FormatError, match=words) as caught:
            PeftModel.from_pretrained(base, name, endpoint=hub.url, **options)
        said = str(caught.value)
        assert name in said and hub.url in said and "\n" not in said and caught.value.hint
        assert isinstance(caught.value, OSError) and isinstance(caught.value, ValueError), "as PEFT's"
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_a_hub_that_does_not_answer_is_called_so(tmp_path, hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    with pytest.raises(FormatError, match=r"127.0.0.1:9: the hub does not answer, .* check the connection"):
        PeftModel.from_pretrained(tiny("llama"), "someone/adapter", endpoint="http://127.0.0.1:9", cache_dir=tmp_path)


def test_what_comes_from_the_hub_is_checked_like_any_folder(hub, folder):
    repo = hub.add("someone/adapter", folder)
    files = dict(repo.main)
    damaged = bytearray(files[WEIGHTS])
    damaged[-1] ^= 1
    repo.commit({**files, WEIGHTS: bytes(damaged)})
    with pytest.raises(IntegrityError, match="damaged"):
        load("someone/adapter", hub)
    repo.commit({**files, "adapter_config.json": b"<html>"})
    with pytest.raises(FormatError, match="not valid JSON at line 1"):
        load("someone/adapter", hub)
    repo.commit({"adapter_config.json": files["adapter_config.json"]})
    with pytest.raises(FormatError, match=re.escape(f"someone/adapter/{WEIGHTS}")):
        load("someone/adapter", hub)


def test_a_repository_with_the_older_format_alone(hub, folder, tmp_path):
    repo = hub.add("someone/old", folder)
    config = repo.main["adapter_config.json"]
    torch.save(load_file(folder / WEIGHTS), tmp_path / "weights")
    repo.commit({"adapter_config.json": config, "adapter_model.bin": (tmp_path / "weights").read_bytes()})
    assert same(load("someone/old", hub))
    trap = tmp_path / "trapped"
    repo.commit(
        {
            "adapter_config.json": config,
            "adapter_model.bin": b"cos\nsystem\n(S'touch " + str(trap).encode() + b"'\ntR.",
        }
    )
    with pytest.raises(UnsafeError, match="never run"):
        load("someone/old", hub)
    assert not trap.exists()


def test_the_newer_format_is_taken_where_a_repository_has_both(hub, folder):
    repo = hub.add("someone/both", folder)
    repo.commit({**repo.main, "adapter_model.bin": b"the same in the older format"})
    assert same(load("someone/both", hub))
    assert not any("adapter_model.bin" in line for line in hub.requests)
