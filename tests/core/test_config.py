"""Configs: what is refused, in words that name the field and the way out; what is accepted with a warning."""

import json
import math

import pytest

import deltatune
from deltatune import METHODS, LoraConfig, PeftConfig, PeftType, TaskType, get_peft_config
from deltatune.errors import ConfigError, FormatError, LimitError, PeftWarning


@pytest.mark.parametrize(
    "kind,field,nearest",
    [("LoraConfig", "lora_alhpa", "lora_alpha"), ("LoraConfig", "target_module", "target_modules"),
     ("OFTConfig", "block_size", "oft_block_size"), ("IA3Config", "feedforward_module", "feedforward_modules"),
     ("HRAConfig", "apply_gs", "apply_GS"), ("PrefixTuningConfig", "num_virtual_token", "num_virtual_tokens")],
)  # fmt: skip
def test_an_unknown_field_is_answered_with_the_nearest(kind, field, nearest):
    with pytest.raises(ConfigError, match=rf"{kind}.*'{field}'.*did you mean '{nearest}'") as caught:
        getattr(deltatune, kind)(**{field: 1})
    assert caught.value.field == field and isinstance(caught.value, TypeError) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "field,value",
    [
        *[("r", value) for value in (0, -4, 2.5, True, "8", None, [8])],
        *[("lora_alpha", value) for value in (0, -1, math.nan, math.inf, "16", None, True)],
        *[("lora_dropout", value) for value in (math.nan, -0.1, 1.0, 1.5, "0.1", None)],
        *[("init_lora_weights", value) for value in ("piza", "pissa_niter_", 1, "True")],
        *[("target_modules", value) for value in (1, [1, 2], {"q": 1}, b"q")],
        *[("rank_pattern", value) for value in ({"q": 0}, {"q": 2.5}, ["q"], {"(": 2})],
        *[("alpha_pattern", value) for value in ({"q": -1}, {"q": math.nan})],
        ("target_modules", "q_proj|("),
        ("exclude_modules", "*"),
        ("bias", "some"),
        ("use_rslora", "yes"),
        ("modules_to_save", "classifier"),
        ("task_type", "CAUSAL"),
        ("layers_pattern", "h"),
        ("fan_in_fan_out", 1),
        ("revision", 3),
    ],
)
def test_a_wrong_value_is_refused_by_name(field, value):
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**{field: value})
    assert field in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.field is not None and caught.value.field.startswith(field)


@pytest.mark.parametrize(
    "kind,options",
    [
        ("OFTConfig", {"r": -1}),
        ("OFTConfig", {"oft_block_size": 2.0}),
        ("OFTConfig", {"eps": 0.0}),
        ("OFTConfig", {"module_dropout": 1.0}),
        ("HRAConfig", {"r": 0}),
        ("HRAConfig", {"bias": "lora_only"}),
        ("IA3Config", {"feedforward_modules": 3}),
        ("PrefixTuningConfig", {"num_virtual_tokens": 0}),
        ("PrefixTuningConfig", {"layout": "other"}),
    ],
)
def test_the_other_methods_check_their_fields_too(kind, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        getattr(deltatune, kind)(**options)


def test_layer_numbers_need_a_list_of_names():
    with pytest.raises(ConfigError, match="layers_to_transform"):
        LoraConfig(target_modules=r".*q", layers_to_transform=[1])


def test_a_changed_config_is_checked_again_when_used():
    import torch

    config = LoraConfig(target_modules=["0"])
    config.r = -2
    with pytest.raises(ConfigError, match="r=-2"):
        deltatune.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)


def test_a_retired_option_that_asks_for_nothing_is_accepted_with_a_warning():
    """The article's dict has it; PEFT 0.21 raises."""
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "inference_mode": False,
        "r": 8,
        "target_modules": ["q", "v"],
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "fan_in_fan_out": False,
        "enable_lora": None,
        "bias": "none",
    }
    with pytest.warns(PeftWarning, match="enable_lora=None is a retired option"):
        made = get_peft_config(config)
    assert isinstance(made, LoraConfig) and made.r == 8 and made.target_modules == {"q", "v"}
    assert made.task_type is TaskType.SEQ_2_SEQ_LM and "enable_lora" not in made.to_dict()
    with pytest.raises(ConfigError, match="enable_lora"):
        get_peft_config({**config, "enable_lora": [True, False]})
    for value in (False, True):  # whether PEFT 0.2 merged in evaluation, which gives the same outputs
        with pytest.warns(PeftWarning, match="merge_weights"):
            LoraConfig(merge_weights=value)


def test_the_dict_needs_a_method_that_exists_and_is_built(monkeypatch):
    with pytest.raises(ConfigError, match="'peft_type'"):
        get_peft_config({"r": 8})
    with pytest.raises(ConfigError, match="did you mean 'LORA'"):
        get_peft_config({"peft_type": "LORRA"})
    monkeypatch.delitem(METHODS, PeftType.HRA)
    with pytest.raises(ConfigError, match="HRA is not available"):
        get_peft_config({"peft_type": "HRA"})


# --------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "OFTConfig", "HRAConfig", "PrefixTuningConfig"])
def test_a_config_survives_its_file(kind, tmp_path):
    options = {} if kind == "PrefixTuningConfig" else {"target_modules": ["b", "a"], "modules_to_save": ["head"]}
    if kind == "PrefixTuningConfig":
        options = {"num_virtual_tokens": 3}
    config = getattr(deltatune, kind)(task_type="CAUSAL_LM", **options)
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config) and loaded.to_file_dict() == config.to_file_dict()
    text = (tmp_path / "adapter_config.json").read_text()
    assert json.loads(text)["peft_version"] == "0.21.2" and '"inference_mode": false' in text
    if "target_modules" in options:
        assert json.loads(text)["target_modules"] == ["a", "b"]


@pytest.mark.parametrize(
    "content,error,words",
    [
        (b"", FormatError, "line 1"),
        (b'{"peft_type": "LORA", "r": 8', FormatError, "line 1, column"),
        (b'{"peft_type": "LORA",\n "r": }', FormatError, "line 2"),
        (b'{"peft_type": "LORA", "r": 8, "r": 16}', FormatError, "'r' stands twice"),
        (b'{"peft_type": "LORA", "lora_alpha": NaN}', FormatError, "NaN"),
        (b'{"peft_type": "LORA", "lora_alpha": Infinity}', FormatError, "Infinity"),
        (b"[1, 2]", FormatError, "list"),
        (b"\xff\xfe{}", FormatError, "cannot be read"),
        (b'{"peft_type": "LORA", "x": "' + b"y" * 1_000_001 + b'"}', LimitError, "1000000"),
        (b'{"peft_type": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", (LimitError, FormatError), "deep|read"),
        (b'{"peft_type": "LORA", "r": "8"}', ConfigError, "r='8'"),
        (b'{"peft_type": "NEW_THING"}', ConfigError, "NEW_THING"),
    ],
    ids=[
        "empty",
        "truncated",
        "gap",
        "twice",
        "nan",
        "infinity",
        "list",
        "encoding",
        "large",
        "deep",
        "type",
        "method",
    ],
)
def test_a_bad_file_is_refused_by_name_and_place(content, error, words, tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content)
    with pytest.raises(error, match=words) as caught:
        PeftConfig.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    if error is FormatError:
        assert str(path) in str(caught.value)


def test_unknown_keys_of_a_file_are_kept_with_a_warning_and_saved_again(tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_text('{"peft_type": "LORA", "r": 4, "from_the_future": [1]}')
    with pytest.warns(PeftWarning, match="from_the_future"):
        config = PeftConfig.from_pretrained(tmp_path)
    assert config.r == 4
    config.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["from_the_future"] == [1]


def test_all_method_names_of_peft_are_known():
    peft = pytest.importorskip("peft", reason="peft, whose names these are, is not installed")
    assert {member.value for member in peft.PeftType} <= {member.value for member in deltatune.PeftType}
    assert {member.value for member in peft.TaskType} == {member.value for member in deltatune.TaskType}


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "OFTConfig", "HRAConfig"])
def test_fields_and_defaults_are_pefts(kind):
    peft = pytest.importorskip("peft", reason="peft, whose defaults these are, is not installed")
    ours, theirs = getattr(deltatune, kind)().to_dict(), getattr(peft, kind)().to_dict()
    beyond = getattr(deltatune, kind).beyond_peer | getattr(deltatune, kind).unsaved
    differing = {key: (ours.get(key), value) for key, value in theirs.items() if key not in ours or ours[key] != value}
    assert differing == {} and set(ours) - set(theirs) == beyond
