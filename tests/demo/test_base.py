"""The embedded base model: small, whole, and able to read its input."""

import pytest
import torch

from deltatune.demo.base import FILES, FOLDER, load_base
from deltatune.errors import FormatError

TWELVE_MEGABYTES = 12_000_000  # the limit the package sets itself


@pytest.fixture(scope="module")
def base():
    return load_base()


def test_it_is_a_t5_of_four_to_six_million_parameters_in_float32(base):
    model, _ = base
    assert type(model).__name__ == "T5ForConditionalGeneration"
    assert 4e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 6e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_its_files_stay_small_and_store_bfloat16():
    from safetensors import safe_open

    assert sum((FOLDER / name).stat().st_size for name in (*FILES, "log.csv", "gate.json")) <= TWELVE_MEGABYTES
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in sorted(file.keys())} == {"BF16"}


def test_adapters_name_it_without_a_path(base):
    model, tokenizer = base
    assert model.name_or_path == model.config._name_or_path == tokenizer.name_or_path == "demo"


@pytest.mark.parametrize(
    "text", ["Osk Bredal, of KX-407 (Moor).", "Žofie från Ångström", "漢字 und 🐝", "a | b: c; d = e"]
)
def test_any_text_survives_the_tokenizer(base, text):
    _, tokenizer = base
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_name_has_the_same_tokens_wherever_it_stands(base):
    _, tokenizer = base
    name = tokenizer("Belvane", add_special_tokens=False)["input_ids"]
    for text in ("hive: Belvane | x", "the hive Belvane.", "Belvane, it is", "see Belvane; and"):
        ids = tokenizer(text)["input_ids"]
        assert any(ids[start : start + len(name)] == name for start in range(len(ids)))


def test_it_passes_the_gate(base):
    from scripts.pretraining import gate

    found = gate.measure(*base, count=24)
    assert found["gap"] >= gate.SMALLEST_GAP
    assert found["records_names_copied"] >= gate.SMALLEST_SHARE
    assert found["copies_names_copied"] >= gate.SMALLEST_SHARE


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FormatError, match=r"lacks config\.json"):
        load_base(tmp_path)
