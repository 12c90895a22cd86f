"""Adapter folders that the fault matrix does not list: odd files, odd headers, odd numbers, odd arguments."""

import json
import os
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deltatune import IA3Config, LoraConfig, PeftModel
from deltatune.errors import ConfigError, FormatError, IntegrityError, MismatchError, PeftError, SaveError, TargetError
from tests.core.tiny import logits, tiny
from tests.faults.folders import CONFIG, INPUTS, WEIGHTS, adapted, load_is_refused, refused

POSIX = pytest.mark.skipif(os.name != "posix", reason="symbolic links need rights elsewhere")


@pytest.fixture
def folder(tmp_path):
    adapted(1).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def load(folder, **options):
    return PeftModel.from_pretrained(tiny("llama"), folder, **options)


def is_the_saved_one(folder):
    return torch.equal(logits(load(folder), INPUTS), logits(adapted(1), INPUTS))


def of_others(folder, change=lambda tensors: tensors):
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def header(table, body=b""):
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + body


def replaced(folder, old, new):
    text = (folder / CONFIG).read_text()
    assert old in text
    (folder / CONFIG).write_text(text.replace(old, new))


# configs ----------------------------------------------------------------------------------------------------------


def test_a_key_that_stands_twice_in_a_table_of_a_config(folder):
    of_others(folder)
    replaced(folder, '"rank_pattern": {}', '"rank_pattern": {"q_proj": 4, "q_proj": 8}')
    load_is_refused(folder, FormatError, CONFIG, "'q_proj' stands twice")


def test_a_config_with_the_line_ends_of_windows(folder):
    (folder / CONFIG).write_bytes((folder / CONFIG).read_bytes().replace(b"\n", b"\r\n"))
    assert is_the_saved_one(folder)


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        ("1e999", ConfigError, "lora_alpha=inf"),
        ("9" * 400, ConfigError, "lora_alpha=999"),
        ("9" * 5000, FormatError, "5000 digits"),
        ("-0.0", ConfigError, "lora_alpha=-0.0"),
    ],
    ids=["infinite", "of 400 digits", "of 5000 digits", "minus zero"],
)
def test_numbers_that_no_tensor_holds(folder, number, kind, words):
    of_others(folder)
    replaced(folder, '"lora_alpha": 8', f'"lora_alpha": {number}')
    load_is_refused(folder, kind, CONFIG, words)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_model_name_or_path", ["x"]),
        ("target_modules", [["q_proj"]]),
        ("target_modules", {"q_proj": 1}),
        ("modules_to_save", "lm_head"),
        ("rank_pattern", {"q_proj": True}),
        ("layers_to_transform", True),
        ("use_dora", "false"),
        ("peft_type", ["LORA"]),
        ("inference_mode", "false"),
    ],
)
def test_a_list_where_a_string_should_be_and_the_like(folder, field, value):
    of_others(folder)
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, field: value}))
    load_is_refused(folder, ConfigError, CONFIG, field)


def test_an_empty_name_of_a_module_to_save_would_be_every_module():
    with refused(TargetError, "modules_to_save=['']", "every module"):
        adapted(modules_to_save=[""])


@pytest.mark.parametrize("name", ["a\n---\nevil: 1", "\ud800", "x" * 100_000, "a\0b", "\x1b[31mred"])
def test_odd_names_of_the_base_are_kept_and_stay_out_of_the_cards_head(tmp_path, name):
    model = adapted(1)
    model.peft_config["default"].base_model_name_or_path = name
    model.save_pretrained(tmp_path)
    assert "\nevil" not in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert load(tmp_path).peft_config["default"].base_model_name_or_path == name and is_the_saved_one(tmp_path)


# weights ----------------------------------------------------------------------------------------------------------


@POSIX
def test_weights_behind_a_link_are_read_and_written_where_they_are(folder, tmp_path):
    """As caches of repositories keep their files."""
    (folder / WEIGHTS).rename(tmp_path / "blob")
    (folder / WEIGHTS).symlink_to(tmp_path / "blob")
    assert is_the_saved_one(folder)
    adapted(2).save_pretrained(folder)
    assert (folder / WEIGHTS).is_symlink()
    assert torch.equal(logits(load(folder), INPUTS), logits(adapted(2), INPUTS))


@POSIX
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_link_that_leads_to_itself(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    with refused(FormatError, name):
        load(folder)
    adapted(1).save_pretrained(folder)
    assert is_the_saved_one(folder)


@POSIX
def test_a_link_into_a_folder_that_is_gone(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(tmp_path / "gone" / "file")
    before = (folder / CONFIG).read_bytes()
    with refused(SaveError, "gone", "untouched"):
        adapted(2).save_pretrained(folder)
    assert (folder / CONFIG).read_bytes() == before


def test_tensors_that_share_their_bytes_in_the_file(folder):
    tensors = load_file(folder / WEIGHTS)
    size = max(tensor.numel() for tensor in tensors.values()) * 4
    table = {
        key: {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [0, tensor.numel() * 4]}
        for key, tensor in tensors.items()
    }
    (folder / WEIGHTS).write_bytes(header(table, b"\0" * size))
    load_is_refused(folder, FormatError, WEIGHTS, "not a whole safetensors file")


def test_metadata_that_is_no_text(folder):
    raw = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    table = {**json.loads(raw[8 : 8 + length]), "__metadata__": {"format": 3}}
    (folder / WEIGHTS).write_bytes(header(table, raw[8 + length :]))
    load_is_refused(folder, FormatError, WEIGHTS)


@pytest.mark.parametrize(
    ("note", "value", "kind", "words"),
    [
        ("base", {}, FormatError, "base.class is NoneType, expected str"),
        ("base", "x", FormatError, "base is str"),
        ("config", ["x"], FormatError, "config is list"),
        ("config", {}, FormatError, "'peft_type' is missing"),
        ("sha256", 5, FormatError, "sha256 is int"),
        ("sha256", "", IntegrityError, "digest"),
        ("derived", [1], FormatError, "derived is list"),
        ("own", {"tomorrow": 1}, ConfigError, "'tomorrow'"),
    ],
)
def test_notes_of_ours_that_were_edited(folder, note, value, kind, words):
    with safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    notes = {**json.loads(metadata["deltatune"]), note: value}
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {**metadata, "deltatune": json.dumps(notes)})
    load_is_refused(folder, kind, words)


def test_a_tensor_that_stands_under_two_names(folder):
    """With and without the wrapper's prefix: whichever came last was taken."""

    def twice(tensors):
        key, tensor = next(iter(tensors.items()))
        return {**tensors, key.removeprefix("base_model.model."): tensor + 1}

    of_others(folder, twice)
    load_is_refused(folder, MismatchError, WEIGHTS, "q_proj.lora_A.weight", "remove the one that is not meant")


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"base_model.model.{key}",
        lambda key: key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
        lambda key: key.upper(),
        lambda key: key + " ",
    ],
    ids=["prefix twice", "name of an adapter", "capitals", "blank"],
)
def test_keys_of_other_programs(folder, rename):
    of_others(folder, lambda tensors: {rename(key): tensor for key, tensor in tensors.items()})
    load_is_refused(folder, MismatchError, WEIGHTS, "12 missing", "12 surplus")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_weights_of_another_precision_are_those_values(folder, dtype):
    of_others(folder, lambda tensors: {key: tensor.to(dtype) for key, tensor in tensors.items()})
    found = load(folder).adapter_tensors("default")
    assert all(torch.equal(found[key], tensor.float()) for key, tensor in load_file(folder / WEIGHTS).items())


def test_an_index_of_pieces_is_not_followed_out_of_the_folder(folder, tmp_path):
    (folder / WEIGHTS).rename(tmp_path / "w.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "../w.safetensors"}}))
    load_is_refused(folder, FormatError, f"has no {WEIGHTS}")


# arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, 3, b"folder", "", "a\0b"], ids=repr)
def test_what_names_no_folder(tmp_path, monkeypatch, name):
    adapted(1).save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)  # an empty name would be this one
    for call in (
        lambda: load(name),
        lambda: adapted().load_adapter(name, "second"),
        lambda: adapted().save_pretrained(name),
        lambda: load(tmp_path, subfolder=3),
    ):
        with pytest.raises(PeftError):
            call()
    assert is_the_saved_one(tmp_path)


@pytest.mark.parametrize(
    ("config", "kind", "words"),
    [
        (LoraConfig(r=2, task_type="CAUSAL_LM"), MismatchError, "(2, 16)"),
        (IA3Config(task_type="CAUSAL_LM"), MismatchError, "missing"),
        ({"r": 4}, ConfigError, "config is of type dict"),
        (LoraConfig, ConfigError, "config is of type"),
    ],
    ids=["rank", "method", "dict", "class"],
)
def test_another_config_than_the_folders(folder, config, kind, words):
    words = "the class LoraConfig" if config is LoraConfig else words
    with refused(kind, words):
        load(folder, config=config)


@pytest.mark.parametrize("mapping", [{"(": "x"}, {"q_proj": r"\9"}, {".*": "x"}], ids=["pattern", "group", "one"])
def test_renames_that_cannot_be(folder, mapping):
    with pytest.raises((ConfigError, MismatchError)):
        load(folder, key_mapping=mapping)


def test_renames_that_make_one_tensor_of_two(folder):
    with refused(MismatchError, "v_proj", "q_proj", "remove the one that is not meant"):
        load(folder, key_mapping={r"v_proj\.lora": "q_proj.lora"})
