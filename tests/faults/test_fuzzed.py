"""Cases that `make fuzz` has found, and a few hundred fresh ones: success or a deltatune error, nothing else."""

import json
import os
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deltatune import IA3Config, LoraConfig, PeftConfig, PeftModel
from deltatune.errors import ConfigError, FormatError, LimitError, MismatchError, PeftError
from deltatune.storage.tensors import read_file
from tests.core.tiny import tiny
from tests.faults.folders import CONFIG, WEIGHTS, adapted, load_is_refused, refused
from tests.faults.test_load import KEY, header


@pytest.fixture
def folder(tmp_path):
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("value", [["LORA"], {}, [[]], 3])
def test_a_method_that_is_no_word(value):
    with refused(ConfigError, "peft_type"):
        PeftConfig.from_file_dict({"peft_type": value}) if value else PeftConfig(peft_type=value)


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("DELORA", "delora_lambda", 1e39), ("FROD", "regularization_alpha", 10**400), ("LORA", "lora_alpha", -(10**30)),
        ("PROMPT_TUNING", "num_virtual_tokens", 10**30), ("SUPERTUNING", "r", {}),
    ],
)  # fmt: skip
def test_numbers_that_no_tensor_can_hold(method, field, value):
    with refused(ConfigError, field):
        PeftConfig.from_file_dict({"peft_type": method, field: value})


@pytest.mark.parametrize(
    "facts",
    [
        "[" * 2000 + "]" * 2000, '{"base": "T5"}', '{"base": {"structure": 3}}', '{"config": []}', '{"sha256": {}}',
        '{"own": "r"}', "{",
    ],
)  # fmt: skip
def test_notes_of_another_shape(folder, facts):
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"deltatune": facts})
    load_is_refused(folder, FormatError, WEIGHTS)


def test_an_old_file_whose_entry_claims_more_bytes_than_there_are(folder):
    """A zip of torch.save, of which one bit of a size has changed."""
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    content = bytearray((folder / "adapter_model.bin").read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0"))  # in the table at the end
    for size in (20, 24):  # of what is stored, and of what it unfolds to
        content[entry + size : entry + size + 4] = (len(content) * 2).to_bytes(4, "little")
    (folder / "adapter_model.bin").write_bytes(content)
    load_is_refused(folder, FormatError, "adapter_model.bin")


@pytest.mark.parametrize("value", [[[0, 2]], [{}], [None], [["q_proj"]]])
def test_targets_that_are_lists_of_lists(value):
    for field in ("target_modules", "exclude_modules"):
        with refused(ConfigError, field):
            LoraConfig(**{field: value})
    with refused(ConfigError, "feedforward_modules"):
        IA3Config(feedforward_modules=value)


def test_floats_of_eight_bits_have_no_sum(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, KEY: tensors[KEY].to(torch.float8_e4m3fn)}, folder / WEIGHTS)
    PeftModel.from_pretrained(tiny("llama"), folder)
    bad = torch.full_like(tensors[KEY], float("nan")).to(torch.float8_e4m3fn)
    save_file({**tensors, KEY: bad}, folder / WEIGHTS)
    load_is_refused(folder, MismatchError, KEY, "not finite")


def test_a_name_in_a_file_cannot_break_the_line_or_move_the_cursor(folder):
    entry = {"dtype": "a\nb\x1b[31m", "shape": [1], "data_offsets": [0, 4]}
    (folder / WEIGHTS).write_bytes(header({"x": entry}, b"\0" * 4))
    with refused(FormatError, "a\\nb"):
        PeftModel.from_pretrained(tiny("llama"), folder)


def test_a_header_that_would_take_much_memory_to_parse(folder):
    (folder / WEIGHTS).write_bytes(header({"x": [[] for _ in range(500_000)]}))
    load_is_refused(folder, LimitError, "lists and tables", str(folder))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted(LoraConfig().to_dict())


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_any_values_in_a_config_make_one_or_a_deltatune_error(values):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = PeftConfig.from_file_dict({**values, "peft_type": "LORA"})
        except PeftError as error:
            assert "\n" not in str(error) and len(str(error)) < 5000
        else:
            found.validate()
            json.dumps(found.to_file_dict())


@given(st.dictionaries(st.text(max_size=8), JSON, max_size=3), st.binary(max_size=40))
def test_any_header_gives_tensors_or_a_deltatune_error(tmp_path_factory, table, body):
    file = tmp_path_factory.mktemp("any") / WEIGHTS
    file.write_bytes(header(table, body))
    try:
        tensors, _ = read_file(file)
    except PeftError as error:
        assert "\n" not in str(error) and str(file) in str(error)
    else:
        assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="memory is measured as Linux does")
@pytest.mark.parametrize("target", ["folders", "configs"])
def test_mutated_ones_end_well_within_limits_of_time_and_memory(target, tmp_path):
    import importlib

    from scripts.fuzzing.isolated import Limits, run

    made = importlib.import_module(f"scripts.fuzzing.{target}").Target(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(20_000, 20_040):
            case = made.make(number)
            outcome = run(lambda case=case: made.use(case), Limits(seconds=10, megabytes=500))
            assert outcome.good, (number, case.story, outcome)
            made.clear(case)


def test_a_config_alone_is_as_strict(folder):
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": [["q_proj"]]}))
    with refused(ConfigError, str(folder), "target_modules"):
        PeftConfig.from_pretrained(folder)
