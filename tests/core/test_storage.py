"""Folders: what is written, what is refused, and whose word counts."""

import json
import os
import stat
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltatune import LoraConfig, PeftModel, get_peft_model
from deltatune.errors import (
    AdapterNameError,
    FormatError,
    IntegrityError,
    LimitError,
    MismatchError,
    PeftWarning,
    SaveError,
    UnsafeError,
)
from tests.core.tiny import batch, logits, tiny
from tests.laws.examples import move

INPUTS = batch("llama")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapted(seed: int = 0, **options):
    model = get_peft_model(tiny("llama"), LoraConfig(task_type="CAUSAL_LM", **{"r": 4, **options})).eval()
    torch.manual_seed(seed)
    move(model)
    return model


@pytest.fixture
def folder(tmp_path):
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def load(folder, **options):
    return PeftModel.from_pretrained(tiny("llama"), folder, **options)


def test_the_folder_holds_pefts_two_files_and_a_card(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    assert set(load_file(folder / WEIGHTS)) == {
        f"base_model.model.model.layers.{i}.self_attn.{p}_proj.lora_{ab}.weight"
        for i in range(3) for p in "qv" for ab in "AB"
    }  # fmt: skip
    assert "library_name: peft" in (folder / "README.md").read_text()


def test_a_card_of_the_users_is_left_alone(folder):
    (folder / "README.md").write_text("---\nbroken: [yaml\n---\nmine")
    (folder / "notes.txt").write_text("mine too")
    adapted(1).save_pretrained(folder)
    assert (folder / "README.md").read_text().endswith("mine") and (folder / "notes.txt").exists()


@pytest.mark.parametrize("position", [-1, -100, -2000])
def test_a_flipped_bit_is_found(folder, position):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[position] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(IntegrityError, match="damaged") as caught:
        load(folder)
    assert caught.value.found != caught.value.expected and str(folder) in str(caught.value)


def test_a_file_cut_anywhere_is_refused(folder):
    content = (folder / WEIGHTS).read_bytes()
    for size in (0, 5, 8, 100, len(content) // 2, len(content) - 1):
        (folder / WEIGHTS).write_bytes(content[:size])
        with pytest.raises(FormatError, match=f"{size}"):
            load(folder)


@pytest.mark.parametrize(
    "content,words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "no safetensors file"),
        (os.urandom(4096), "safetensors|header"),
        (struct.pack("<Q", 4) + b"[{}]", "table of tensors|header|safetensors"),
        (struct.pack("<Q", 2) + b"{}" + b"rest", "safetensors"),
    ],
    ids=["lfs", "html", "random", "list", "rest"],
)
def test_what_is_no_safetensors_file_is_called_so(folder, content, words):
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises((FormatError, LimitError), match=words):
        load(folder)


def change(folder, function):
    save_file(function(load_file(folder / WEIGHTS)), folder / WEIGHTS)


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "function,words",
    [
        (lambda t: {k: v for k, v in t.items() if k != KEY}, r"1 missing \(.*layers\.1\.self_attn\.q_proj\.lora_A"),
        (lambda t: {**t, "base_model.model.extra.lora_A.weight": torch.zeros(1)}, r"1 surplus \(.*extra"),
        (lambda t: {**t, "base_model.model.model.norm.weight": torch.zeros(16)}, "surplus .*norm"),
        (lambda t: {k.replace("layers", "blocks"): v for k, v in t.items()}, "12 missing .*12 surplus"),
        (lambda t: {}, "12 missing"),
        (
            lambda t: {**t, KEY: t[KEY].T.contiguous()},
            r"lora_A.weight has shape \(16, 4\), the model expects \(4, 16\)",
        ),
        (lambda t: {**t, KEY: t[KEY] / 0}, "not finite"),
        (lambda t: {**t, KEY: t[KEY].int()}, "int32"),
        (lambda t: {k.replace("lora_A.weight", "lora_A.default.weight"): v for k, v in t.items()}, "missing"),
    ],
    ids=["missing", "surplus", "base", "renamed", "empty", "transposed", "infinite", "integer", "named"],
)
def test_tensors_that_do_not_fit_are_named(folder, function, words):
    change(folder, function)
    base = tiny("llama")
    before = {name: p.clone() for name, p in base.named_parameters()}
    attack = words == "surplus .*norm"  # a tensor of the base itself
    with pytest.raises(UnsafeError if attack else MismatchError, match=words) as caught:
        PeftModel.from_pretrained(base, folder)
    assert "\n" not in str(caught.value)
    assert {name: id(p) for name, p in base.named_parameters()}.keys() == before.keys()
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in base.named_parameters())


def test_too_large_for_float16(folder):
    change(folder, lambda t: {**t, KEY: t[KEY] * 1e6})
    with pytest.raises(MismatchError, match="too large for float16"):
        PeftModel.from_pretrained(tiny("llama").half(), folder, autocast_adapter_dtype=False, allow_base_mismatch=True)


def test_another_base_is_told_apart_by_shape_and_by_values(folder):
    with pytest.raises(MismatchError, match=r"LlamaForCausalLM of .* parameters, this is LlamaForCausalLM of"):
        PeftModel.from_pretrained(tiny("llama", num_hidden_layers=4), folder)
    with pytest.raises(MismatchError, match="same shape with other weights"):
        PeftModel.from_pretrained(tiny("llama", seed=9), folder)
    with pytest.raises(MismatchError, match="GPT2LMHeadModel"):
        PeftModel.from_pretrained(tiny("gpt2"), folder)
    PeftModel.from_pretrained(tiny("llama", seed=9), folder, allow_base_mismatch=True)
    PeftModel.from_pretrained(tiny("llama").to(torch.bfloat16), folder)  # the same base in another precision


def test_a_base_that_carries_adapters_is_the_same_base(folder):
    model = adapted(1)
    model.base_model.merge_adapter()
    model.base_model.unmerge_adapter()
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    assert torch.equal(logits(model, INPUTS), logits(load(folder), INPUTS))


def test_a_pickle_is_never_run_and_never_passed_over(folder, tmp_path):
    trap = tmp_path / "trapped"
    pickle = b"cos\nsystem\n(S'touch " + str(trap).encode() + b"'\ntR."
    (folder / "adapter_model.bin").write_bytes(pickle)
    with pytest.raises(UnsafeError, match=r"remove the one that is not"):
        load(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UnsafeError, match="never run"):
        load(folder)
    assert not trap.exists()


def test_the_header_wins_over_an_edited_config(folder):
    expected = logits(load(folder), INPUTS)
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, "lora_alpha": 99, "base_model_name_or_path": "moved/here"}))
    with pytest.warns(PeftWarning, match=r"\['lora_alpha'\] differ .* the saved values are used"):
        model = load(folder)
    assert torch.equal(logits(model, INPUTS), expected)
    assert model.peft_config["default"].base_model_name_or_path == "moved/here", "where the base is may be edited"


def test_a_config_changed_in_memory_after_grafting_is_seen_at_loading(tmp_path):
    model = adapted()
    model.peft_config["default"].r = 2
    model.save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match="has shape"):
        load(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="file modes are a POSIX matter")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_follow_the_umask_and_stay_when_overwritten(tmp_path, umask):
    old = os.umask(umask)
    try:
        adapted().save_pretrained(tmp_path)
    finally:
        os.umask(old)
    for name in (WEIGHTS, CONFIG):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask
    (tmp_path / WEIGHTS).chmod(0o640)
    adapted(1).save_pretrained(tmp_path)
    assert stat.S_IMODE((tmp_path / WEIGHTS).stat().st_mode) == 0o640


@pytest.mark.skipif(os.name != "posix", reason="symbolic links need rights elsewhere")
def test_a_link_stays_a_link(folder, tmp_path):
    real = tmp_path / "real.safetensors"
    (folder / WEIGHTS).rename(real)
    (folder / WEIGHTS).symlink_to(real)
    adapted(1).save_pretrained(folder)
    assert (folder / WEIGHTS).is_symlink() and torch.equal(logits(load(folder), INPUTS), logits(adapted(1), INPUTS))


def test_a_full_disk_leaves_the_old_adapter_whole(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match="No space left on device") as caught:
        adapted(1).save_pretrained(folder)
    assert caught.value.found == 28
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_failing_rename_leaves_the_old_adapter_whole(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replace = os.replace

    def failing(source, target):
        if str(target).endswith(WEIGHTS):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(SaveError, match="Input/output error"):
        adapted(1, r=2).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_failing_first_save_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(13, "Permission denied")))
    with pytest.raises(SaveError):
        adapted().save_pretrained(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_loaded_tensors_do_not_depend_on_the_file_any_more(folder):
    model = load(folder)
    expected = logits(model, INPUTS)
    with open(folder / WEIGHTS, "r+b") as file:
        file.write(b"\0" * 4000)
        file.truncate(4000)
    assert torch.equal(logits(model, INPUTS), expected)


def test_places_that_are_no_adapter_folder(folder, tmp_path):
    for place in (tmp_path / "nowhere", "./nowhere", "a/b/c"):
        with pytest.raises(FormatError, match="does not exist"):
            load(place)
    with pytest.raises(FormatError, match="is not an adapter folder"):
        load(tmp_path)
    with pytest.raises(FormatError, match="is a file"):
        load(folder / WEIGHTS)
    with pytest.raises(UnsafeError, match="leads out of"):
        load(folder, subfolder="../other")
    assert torch.equal(logits(load(folder.parent, subfolder="adapter"), INPUTS), logits(load(folder), INPUTS))


def test_chosen_adapters_are_saved(tmp_path):
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2))
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    with pytest.raises(AdapterNameError, match="nope"):
        model.save_pretrained(tmp_path, selected_adapters=["nope"])


def test_loading_onto_a_present_name_fills_it_as_trainers_do_on_resume(folder):
    model = adapted(1)
    model.load_adapter(folder, "default", is_trainable=True)
    assert torch.equal(logits(model, INPUTS), logits(load(folder), INPUTS))
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def test_loaded_for_training_it_trains(folder):
    model = load(folder, is_trainable=True)
    assert model.training and model.get_nb_trainable_parameters()[0] == adapted().get_nb_trainable_parameters()[0]
    model(**INPUTS).loss.backward()


def test_keys_may_be_mapped(folder):
    change(folder, lambda t: {k.replace("self_attn", "attention"): v for k, v in t.items()})
    model = load(folder, key_mapping={r"\.attention\.": ".self_attn."})
    assert torch.equal(logits(model, INPUTS), logits(adapted(), INPUTS))
