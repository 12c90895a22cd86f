"""Saves that fail or meet something: what was there loads as before, or the new adapter does (fault matrix, 52-62)."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deltatune import IA3Config, LoraConfig, PeftModel, get_peft_model
from deltatune.errors import AdapterNameError, PeftWarning, SaveError, UnsafeError
from tests.core.tiny import logits, tiny
from tests.faults.folders import CONFIG, INPUTS, OLDER, WEIGHTS, adapted, failing, refused

FORMATS = pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])


@pytest.fixture
def folder(tmp_path):
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def load(folder, **options):
    return PeftModel.from_pretrained(tiny("llama"), folder, **options)


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def holds(folder, seed, **options):
    return torch.equal(logits(load(folder), INPUTS), logits(adapted(seed, **options), INPUTS))


# 52 ------------------------------------------------------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_disk_that_fails_once_or_for_good(tmp_path, monkeypatch, code, operation, safe):
    adapted().save_pretrained(tmp_path / "adapter", safe_serialization=safe)
    before, new = content(tmp_path / "adapter"), adapted(1)
    error = OSError(code, os.strerror(code))
    for at in (0, 1):
        with failing(monkeypatch, os, operation, at, error), refused(SaveError, os.strerror(code), str(tmp_path)):
            new.save_pretrained(tmp_path / "adapter", safe_serialization=safe)
        assert content(tmp_path / "adapter") == before and holds(tmp_path / "adapter", 0)

    def sticky(*_):
        raise error

    monkeypatch.setattr(os, operation, sticky)
    with refused(SaveError, os.strerror(code), "untouched"):
        new.save_pretrained(tmp_path / "adapter", safe_serialization=safe)
    assert content(tmp_path / "adapter") == before


# 54, 57 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [object(), {1, object()}, float("nan"), torch.ones(1)])
def test_a_config_that_is_no_json_is_refused_before_any_write(folder, value):
    before, model = content(folder), adapted(1)
    model.peft_config["default"].unknown_fields["odd_field"] = value
    with refused(SaveError, "odd_field"):
        model.save_pretrained(folder)
    assert content(folder) == before


@FORMATS
def test_weights_that_are_not_finite_do_not_replace_good_ones(folder, safe):
    before, model = content(folder), adapted(1)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name)[0, 0] = float("inf")
    with refused(SaveError, "lora_B", "not finite", "allow_nonfinite"):
        model.save_pretrained(folder, safe_serialization=safe)
    assert content(folder) == before
    model.save_pretrained(folder, safe_serialization=safe, allow_nonfinite=True)
    assert not logits(load(folder, allow_nonfinite=True), INPUTS).isfinite().all()


# 55 ------------------------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_kind_for_another_base_is_not_replaced_in_silence(folder, monkeypatch):
    other = get_peft_model(tiny("gpt2"), IA3Config(task_type="CAUSAL_LM"))
    with pytest.warns(PeftWarning, match="a LORA adapter for another base .* is replaced by this IA3 one"):
        other.save_pretrained(folder)
    assert PeftModel.from_pretrained(tiny("gpt2"), folder).peft_config["default"].peft_type == "IA3"
    with pytest.warns(PeftWarning, match="a IA3 adapter is replaced by this LORA one"):
        get_peft_model(tiny("gpt2"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(folder)
    with pytest.warns(PeftWarning, match="a LORA adapter for another base .* is replaced by this LORA one"):
        adapted().save_pretrained(folder)


# 56 ------------------------------------------------------------------------------------------------------------------


@FORMATS
def test_two_who_save_to_one_folder_never_leave_a_mixture(tmp_path, safe):
    """Config and tensors of different writers: those that the tensors' file was saved with are one adapter."""
    one, two = adapted(1), adapted(2, r=2, lora_alpha=2)
    expected = [logits(one, INPUTS), logits(two, INPUTS)]
    for model, name in ((one, "one"), (two, "two")):
        model.save_pretrained(tmp_path / name, safe_serialization=safe)
    (tmp_path / "two" / CONFIG).write_bytes((tmp_path / "one" / CONFIG).read_bytes())
    with pytest.warns(PeftWarning, match="the saved values are used"):
        assert torch.equal(logits(load(tmp_path / "two"), INPUTS), expected[1])


@pytest.mark.filterwarnings("ignore:.*the saved values are used")
def test_two_who_save_at_once_leave_one_whole_adapter(tmp_path):
    models = [adapted(1), adapted(2, r=2, lora_alpha=2)]
    expected = [logits(model, INPUTS) for model in models]
    failures = []

    def save(model):
        try:
            for _ in range(10):
                model.save_pretrained(tmp_path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(model,)) for model in models]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert failures == []
    found = logits(load(tmp_path), INPUTS)
    assert any(torch.equal(found, one) for one in expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS], "nothing is left over"


# 58, 59 --------------------------------------------------------------------------------------------------------------


def test_a_users_files_are_untouched_and_have_no_influence(folder):
    mine = {"README.md": b"---\nbroken: [\n---\n", "notes.txt": b"mine", "optimizer.pt": b"", "tokenizer.json": b"{"}
    for name, text in mine.items():
        (folder / name).write_bytes(text)
    adapted(1).save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in mine} == mine and holds(folder, 1)


def test_a_selection_of_nothing_or_of_what_is_not_there(tmp_path):
    model = adapted()
    with refused(SaveError, "no adapter is selected", "default"):
        model.save_pretrained(tmp_path / "new", selected_adapters=[])
    with refused(AdapterNameError, "'nope'", "default"):
        model.save_pretrained(tmp_path / "new", selected_adapters=["default", "nope"])
    assert not (tmp_path / "new").exists()


# 60 ------------------------------------------------------------------------------------------------------------------


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with refused(SaveError, str(tmp_path / "file")):
            adapted().save_pretrained(target)
    (tmp_path / "adapter" / WEIGHTS).mkdir(parents=True)
    with refused(SaveError, WEIGHTS):
        adapted().save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == [WEIGHTS], "nothing is left over"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser writes everywhere")
def test_a_folder_that_may_not_be_written(folder):
    before = content(folder)
    folder.chmod(0o500)
    with refused(SaveError, str(folder), "denied"):
        adapted(1).save_pretrained(folder)
    folder.chmod(0o700)
    assert content(folder) == before


# 61 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="file modes and links are POSIX's")
@FORMATS
def test_modes_follow_the_umask_and_links_stay_links(tmp_path, safe):
    name = WEIGHTS if safe else OLDER
    old = os.umask(0o027)
    try:
        adapted().save_pretrained(tmp_path / "real", safe_serialization=safe)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "real" / name).stat().st_mode) == 0o640
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    adapted(1).save_pretrained(tmp_path / "link", safe_serialization=safe)
    assert (tmp_path / "link").is_symlink() and holds(tmp_path / "real", 1)


# 62 ------------------------------------------------------------------------------------------------------------------


@FORMATS
def test_a_file_of_the_other_format_goes_with_the_save_that_makes_it_stale(tmp_path, safe):
    adapted().save_pretrained(tmp_path, safe_serialization=not safe)
    adapted(1).save_pretrained(tmp_path, safe_serialization=safe)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("adapter_model")) == [
        WEIGHTS if safe else OLDER
    ]
    assert holds(tmp_path, 1)


@FORMATS
def test_a_stop_at_any_step_of_such_a_save_leaves_the_old_adapter_or_the_new(tmp_path, monkeypatch, safe):
    """As a killed process would: nothing is put back, nothing tidied up."""

    class Killed(BaseException):
        pass

    new = adapted(1)
    for operation, owner in (("fsync", os), ("replace", os), ("chmod", Path), ("unlink", Path)):
        for at in range(6):
            folder = tmp_path / f"{operation}{at}"
            adapted().save_pretrained(folder, safe_serialization=not safe)
            with failing(monkeypatch, owner, operation, at, Killed()):
                try:
                    new.save_pretrained(folder, safe_serialization=safe)
                except Killed:
                    pass
            if not (holds(folder, 0) or holds(folder, 1)):
                raise AssertionError(f"neither after {operation} {at}")


def test_a_foreign_file_of_the_other_format_that_comes_later_is_no_silent_choice(folder):
    save_file({}, folder / "x")
    torch.save({}, folder / OLDER)
    with refused(UnsafeError, OLDER, "remove the one"):
        load(folder)
