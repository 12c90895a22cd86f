"""Configs that cannot be: refused by field and file before anything is built (fault matrix, 1-17)."""

import json
import math
import re
import socket
import time
import warnings

import pytest
from safetensors.torch import load_file, save_file
from torch import nn

import deltatune
from deltatune import LoraConfig, PeftModel, get_peft_model
from deltatune.errors import ConfigError, FormatError, LimitError, PeftWarning, TargetError
from tests.core.tiny import tiny
from tests.faults.folders import CONFIG, WEIGHTS, adapted, load_is_refused, refused, state, unchanged


@pytest.fixture
def folder(tmp_path):
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edited(folder, **values):
    found = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**found, **values}))
    return folder


def of_others(folder, **values):
    """As another tool would have written it."""
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)
    return edited(folder, **values)


def graft_is_refused(kind, *words, **options):
    """At construction or when used; the model is bit-identical, and takes a good adapter afterwards."""
    model = tiny("llama")
    before = state(model)
    with refused(kind, *words):
        get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    assert unchanged(model, before)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))


# 1-3, 15, 17 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field,value,words",
    [
        *[("r", value, ()) for value in (0, -4, 2.5, True, "8", None, math.nan)],
        ("r", 10**9, ("at most 16", "model.layers.0.self_attn.q_proj")),
        *[("lora_alpha", value, ()) for value in (math.nan, math.inf, 0, -1, "16", True)],
        *[("lora_dropout", value, ()) for value in (-0.1, 1.0, 1.5, math.nan, "0.1")],
        ("lora_dropout", 1.5, ("[0, 1)",)),
        ("layers_to_transform", [0, 99], ("99", "which has 3", "0 to 2")),
        ("layers_to_transform", [-1, 0], ("-1", "which has 3")),
        ("layer_replication", [[0, 9]], ("9", "3 layers")),
        ("layer_replication", [[0, 2]] * 4000, ("8000", "1000")),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value, words):
    said = [word for word in (field, "" if isinstance(value, list) else f"{value!r}") if word]
    targets = {"target_modules": ["q_proj"]} if field == "layers_to_transform" else {}
    graft_is_refused((ConfigError, TargetError), *said, *words, **{field: value}, **targets)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options,words",
    [
        ({"use_dora": True, "arrow_config": {}}, ("use_dora", "arrow_config")),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, ("layers_to_transform", "target_modules")),
        ({"layers_pattern": "layers"}, ("layers_pattern", "layers_to_transform")),
    ],
)
def test_options_that_exclude_each_other_are_both_named(options, words):
    graft_is_refused(ConfigError, *words, **options)


# 4-6, 11 -------------------------------------------------------------------------------------------------------------


def test_an_unknown_field_in_code_or_in_a_file_of_ours(folder):
    with refused(ConfigError, "'lora_alhpa'", "did you mean 'lora_alpha'"):
        LoraConfig(lora_alhpa=3)
    load_is_refused(edited(folder, lora_alhpa=3), ConfigError, str(folder), "'lora_alhpa'", "did you mean 'lora_alpha'")
    PeftModel.from_pretrained(tiny("llama"), folder, allow_unknown=["lora_alhpa"])


def test_an_unknown_field_in_a_file_of_others_is_kept(folder, tmp_path):
    with pytest.warns(PeftWarning, match="lora_alhpa"):
        model = PeftModel.from_pretrained(tiny("llama"), of_others(folder, lora_alhpa=3))
    model.save_pretrained(tmp_path / "again")
    with pytest.warns(PeftWarning, match="lora_alhpa"):  # what we have kept ourselves we read again
        PeftModel.from_pretrained(tiny("llama"), tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["lora_alhpa"] == 3


def test_a_field_of_a_newer_version_names_both(folder, monkeypatch):
    class Newer(LoraConfig):
        def to_file_dict(self):
            return {**super().to_file_dict(), "use_tomorrow": True}

    monkeypatch.setattr(deltatune, "__version__", "9.9.0")
    model = adapted()
    model.peft_config["default"].__class__ = Newer
    known = set(model.peft_config["default"].to_file_dict())
    monkeypatch.setattr("deltatune.storage.agreement._known", lambda *_: known)
    model.save_pretrained(folder)
    monkeypatch.undo()
    load_is_refused(folder, ConfigError, "'use_tomorrow'", "9.9.0", deltatune.__version__, "allow_unknown")
    with pytest.warns(PeftWarning, match="use_tomorrow"):
        PeftModel.from_pretrained(tiny("llama"), folder, allow_unknown=["use_tomorrow"])


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "theirs"])
@pytest.mark.parametrize(
    "values,kind,words",
    [
        ({"r": "8"}, ConfigError, ("r='8'", "an integer of 1 or more")),
        ({"target_modules": 3}, ConfigError, ("target_modules=3",)),
        ({"target_modules": [1]}, ConfigError, ("target_modules=[1]", "str")),
        ({"rank_pattern": ["q"]}, ConfigError, ("rank_pattern",)),
        ({"task_type": ["x"]}, ConfigError, ("task_type",)),
        ({"peft_type": ["LORA"]}, ConfigError, ("peft_type",)),
        ({"peft_type": "LORRA"}, ConfigError, ("LORRA", "did you mean 'LORA'")),
        ({"peft_type": None}, FormatError, ("peft_type",)),
        ({"target_modules": "q_proj|("}, ConfigError, ("target_modules", "position")),
    ],
)
def test_a_wrong_value_in_a_file_names_file_and_field(folder, theirs, values, kind, words):
    load_is_refused((of_others if theirs else edited)(folder, **values), kind, str(folder / CONFIG), *words)


# 7-10 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content,kind,words",
    [
        (b'{"peft_type": "LORA", "r": 8, "r": 16}', FormatError, ("'r' stands twice",)),
        (b'{"peft_type": "LORA", "lora_alpha": NaN}', FormatError, ("NaN",)),
        (b'{"peft_type": "LORA", "lora_alpha": -Infinity}', FormatError, ("Infinity",)),
        (b"", FormatError, ("line 1, column 1",)),
        (b'{"peft_type": "LORA",\n "r": ', FormatError, ("line 2",)),
        (b"[1]", FormatError, ("a list, expected an object",)),
        (b'"LORA"', FormatError, ("a str, expected an object",)),
        (b"null", FormatError, ("expected an object",)),
        (b'{"peft_type": "LOR\xe9"}', FormatError, ("0xe9",)),
        (b'\xef\xbb\xbf{"peft_type": "LORA"}', FormatError, ("BOM",)),
        (b'{"a": "' + b"x" * 1_000_000 + b'"}', LimitError, ("1000000",)),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", LimitError, ("41 deep", "32")),
        (b'{"a": ' + b"[" * 300_000, LimitError, ("deep",)),
        (b'{"a": "' + b"[" * 40 + b'\\"[", "peft_type": "X"}', ConfigError, ("peft_type='X'",)),  # brackets in a string
    ],
)
def test_what_is_no_json_object_is_refused_with_file_and_place(folder, content, kind, words):
    (folder / CONFIG).write_bytes(content)
    load_is_refused(folder, kind, str(folder / CONFIG), *words)


def test_many_keys_take_no_time(folder):
    """Looking for one that stands twice took quadratic time."""
    (folder / CONFIG).write_text(json.dumps({f"k{index}": 0 for index in range(60_000)}))
    started = time.process_time()
    with refused(FormatError, "peft_type"):
        PeftModel.from_pretrained(tiny("llama"), folder)
    assert time.process_time() - started < 20  # seconds; it was minutes


# 12, 13 --------------------------------------------------------------------------------------------------------------

SLOW = r"(\w|\w\w|\.)+[^\w.]"


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
@pytest.mark.parametrize("pattern", [r"(a|aa)+$", r"((a|a)*)*b", r"(.*)*!", SLOW, r"(x+x+)+y"])
def test_a_pattern_that_backtracks_ends(pattern, field):
    """Put onto a model whose paths are made to suit it; whether it is refused or does not match, it does so soon."""
    path = "a" * 60
    model = nn.ModuleDict({path: nn.Linear(4, 4), "x" * 50: nn.Linear(4, 4)})
    options = {"target_modules": [path], field: {pattern: 2} if field == "rank_pattern" else pattern}
    if field == "layers_pattern":
        options["layers_to_transform"] = [0]
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        try:
            get_peft_model(model, LoraConfig(r=2, **options))
        except (LimitError, TargetError) as error:
            assert pattern in str(error.found) or error.field, error
    assert time.process_time() - started < 20


HUGE = ["((a{1000}){1000}){1000}", "a{4000000000}", "(" * 20_000, "(?:" * 3000 + ")" * 3000]


@pytest.mark.parametrize("pattern", HUGE, ids=["thrice", "count", "open", "deep"])
def test_a_pattern_that_would_fill_the_memory_is_refused(folder, pattern):
    for field, value in (("target_modules", pattern), ("rank_pattern", {pattern: 2})):
        graft_is_refused((LimitError, ConfigError), field, **{field: value})  # type: ignore[arg-type]
    load_is_refused(of_others(folder, target_modules=pattern), (LimitError, ConfigError), "target_modules")  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", [r"^(?!.*lm).*\.(q|k)_proj$", r".*layers\.(0|2)\..*v_proj", r"(?:.*\.)?o_proj"])
def test_patterns_match_as_those_of_python(pattern):
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=pattern, r=2))
    expected = [name for name, _ in tiny("llama").named_modules() if re.fullmatch(pattern, name)]
    assert model.base_model.targeted_module_names == expected and expected


# 14 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field,value",
    [
        ("auto_mapping", {"base_model_class": "Trap", "parent_library": "trap_module"}),
        ("megatron_core", "trap_module"),
        ("megatron_config", {"tensor_model_parallel_size": 1}),
        ("tokenizer_name_or_path", "http://127.0.0.1:9/trap"),
        ("tokenizer_kwargs", {"trust_remote_code": True}),
        ("device_map", "auto"),
        ("cache_dir", "/nowhere"),
        ("corda_config", {"__class__": "trap_module.Trap"}),
        ("trust_remote_code", True),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(does not know|differ from|left out)")
def test_a_field_that_names_code_or_a_place_is_never_followed(folder, tmp_path, monkeypatch, field, value):
    trap = tmp_path / "trapped"
    (tmp_path / "trap_module.py").write_text(f"open({str(trap)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: trap.touch())
    for change in (edited, of_others):
        try:
            PeftModel.from_pretrained(tiny("llama"), change(folder, **{field: value}))
        except ConfigError as error:
            assert field in str(error)
    assert not trap.exists()


# 16 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        '!!python/object/apply:os.system ["touch TRAP"]',
        'a: !!python/object/new:os.system ["touch TRAP"]',
        "method: lora\n\tlr: 1",
        "method: [unclosed",
        "- a\n- b",
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [" + ", ".join([f"*{chr(97 + n)}"] * 9) + "]\n" for n in range(9)),
        "method: &a [*a]",
    ],
    ids=["object", "new", "tab", "unclosed", "list", "bomb", "itself"],
)  # fmt: skip
def test_settings_in_yaml_run_nothing_and_do_not_unfold(tmp_path, content):
    settings = pytest.importorskip("deltatune.train.settings", reason="the settings need the extra 'cli'")
    trap, file = tmp_path / "trapped", tmp_path / "settings.yaml"
    file.write_text(content.replace("TRAP", str(trap)))
    with refused((ConfigError, FormatError, LimitError), str(file)):  # type: ignore[arg-type]
        settings.load_settings(file)
    assert not trap.exists()
