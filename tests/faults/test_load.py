"""Adapters that cannot be loaded: a clear error, and model, adapters and files as they were.

The numbers are those of the fault matrix.
"""

import json
import os
import pickle
import shutil
import struct
import time
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltatune import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from deltatune.errors import FormatError, IntegrityError, LimitError, MismatchError, PeftWarning, UnsafeError
from deltatune.storage.zipped import read_zipped
from tests.core.tiny import logits, tiny
from tests.faults.folders import (
    CONFIG,
    INPUTS,
    OLDER,
    WEIGHTS,
    adapted,
    failing,
    load_is_refused,
    refused,
    state,
    unchanged,
)

KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.fixture(params=[WEIGHTS, OLDER])
def folder(request, tmp_path):
    """In either format."""
    adapted().save_pretrained(tmp_path / "adapter", safe_serialization=request.param == WEIGHTS)
    return tmp_path / "adapter"


@pytest.fixture
def newer(tmp_path):
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def weights(folder):
    return next(path for path in folder.iterdir() if path.name in (WEIGHTS, OLDER))


def foreign(folder, function=lambda tensors: tensors):
    """The folder as another tool would have written it, with other tensors."""
    file = weights(folder)
    if file.name == WEIGHTS:
        save_file(function(load_file(file)), file)
    else:
        torch.save(function(torch.load(file, weights_only=True)), file)


# 31 ------------------------------------------------------------------------------------------------------------------


def test_a_path_where_nothing_is(tmp_path, monkeypatch):
    import socket

    def no_network(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.chdir(tmp_path)
    for name in ("./x", "/x/y", "a/b/c", "~/x", "x\\y", "a/b/", str(tmp_path / "x"), "x" * 400, "x\0y"):
        load_is_refused(name if "\0" not in name else "x\0y", FormatError)


def test_a_file_in_place_of_a_folder_and_a_folder_without_an_adapter(folder, tmp_path):
    load_is_refused(weights(folder), FormatError, "is a file", str(folder))
    (tmp_path / "empty").mkdir()
    load_is_refused(tmp_path / "empty", FormatError, CONFIG, str(tmp_path / "empty"))
    weights(folder).unlink()
    load_is_refused(folder, FormatError, WEIGHTS, str(folder))


# 32 ------------------------------------------------------------------------------------------------------------------


def test_a_file_cut_anywhere(folder):
    content = weights(folder).read_bytes()
    for size in (0, 1, 7, 8, 100, len(content) // 2, len(content) - 1):
        weights(folder).write_bytes(content[:size])
        load_is_refused(folder, (FormatError, UnsafeError), str(weights(folder)))  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>" * 50, os.urandom(3000), b"{}", b"PK\x03\x04" + b"\0" * 90])
def test_a_file_of_something_else(folder, content):
    weights(folder).write_bytes(content)
    load_is_refused(folder, (FormatError, UnsafeError), str(weights(folder)))  # type: ignore[arg-type]


def test_a_git_lfs_pointer_is_called_so(folder):
    weights(folder).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    load_is_refused(folder, FormatError, "git lfs pull")


# 33, 34 --------------------------------------------------------------------------------------------------------------


def first_byte(content, info):
    """Of an entry's values, after its local header, its name and the room that aligns it."""
    name, extra = struct.unpack("<HH", content[info.header_offset + 26 : info.header_offset + 30])
    return info.header_offset + 30 + name + extra


def test_a_flipped_bit_anywhere_among_the_values(folder):
    content = weights(folder).read_bytes()
    places = range(len(content) - 2000, len(content) - 1, 300)
    if weights(folder).name == OLDER:
        with zipfile.ZipFile(weights(folder)) as archive:
            places = [first_byte(content, info) + 9 for info in archive.infolist() if "/data/" in info.filename]
    for place in places:
        spoilt = bytearray(content)
        spoilt[place] ^= 1
        weights(folder).write_bytes(spoilt)
        load_is_refused(folder, (IntegrityError, FormatError), str(weights(folder)))  # type: ignore[arg-type]


def test_a_file_without_a_digest_loads_and_is_not_called_verified(folder):
    model = adapted(1)
    assert model.load_adapter(folder, "ours").verified is True
    foreign(folder)
    assert model.load_adapter(folder, "theirs").verified is None


# 35-40 ---------------------------------------------------------------------------------------------------------------

SPOILT = {
    "missing": (lambda t: {k: v for k, v in t.items() if k != KEY}, ["1 missing", KEY]),
    "all missing": (lambda t: {}, ["12 missing"]),
    "surplus": (lambda t: {**t, "base_model.model.x.lora_A.weight": torch.ones(1)}, ["1 surplus", "x.lora_A"]),
    "renamed": (lambda t: {k.replace("layers", "h"): v for k, v in t.items()}, ["12 missing", "12 surplus"]),
    "base weight": (lambda t: {**t, "base_model.model.model.norm.weight": torch.zeros(16)}, ["model.norm.weight"]),
    "projection": (
        lambda t: {**t, "base_model.model.model.layers.0.self_attn.q_proj.weight": torch.zeros(16, 16)},
        ["self_attn.q_proj.weight"],
    ),
    "wrapped weight": (
        lambda t: {**t, "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": torch.zeros(16, 16)},
        ["q_proj.base_layer.weight"],
    ),
    "other adapter": (lambda t: {**t, KEY.replace("lora_A", "lora_A.other"): torch.zeros(4, 16)}, ["lora_A.other"]),
    "transposed": (lambda t: {**t, KEY: t[KEY].T.contiguous()}, [KEY, "(16, 4)", "(4, 16)"]),
    "fewer rows": (lambda t: {**t, KEY: t[KEY][:2].clone()}, [KEY, "(2, 16)", "(4, 16)"]),
    "scalar": (lambda t: {**t, KEY: torch.tensor(1.0)}, [KEY, "()"]),
    "nan": (lambda t: {**t, KEY: t[KEY].fill_(float("nan"))}, [KEY, "64 values", "not finite"]),
    "infinite": (lambda t: {**t, KEY: t[KEY].fill_(float("inf"))}, [KEY, "not finite"]),
    "integer": (lambda t: {**t, KEY: t[KEY].int()}, [KEY, "int32"]),
    "boolean": (lambda t: {**t, KEY: t[KEY] > 0}, [KEY, "bool"]),
}


@pytest.mark.parametrize("case", SPOILT)
def test_tensors_that_do_not_fit(folder, case):
    function, words = SPOILT[case]
    foreign(folder, function)
    load_is_refused(folder, (MismatchError, UnsafeError), *words)  # type: ignore[arg-type]


def test_values_that_are_not_finite_load_where_that_is_allowed(folder):
    foreign(folder, SPOILT["nan"][0])
    model = PeftModel.from_pretrained(tiny("llama"), folder, allow_nonfinite=True)
    assert logits(model, INPUTS).isnan().any()


def test_a_number_too_large_for_half_precision(folder):
    foreign(folder, lambda t: {**t, KEY: t[KEY] * 1e6})
    with pytest.raises(MismatchError, match="too large for float16"):
        PeftModel.from_pretrained(tiny("llama").half(), folder, autocast_adapter_dtype=False)


# 41, 42 --------------------------------------------------------------------------------------------------------------


def test_another_base(folder):
    for other in (tiny("llama", seed=9), tiny("llama", num_hidden_layers=2), tiny("llama", vocab_size=70)):
        before = state(other)
        with pytest.raises(MismatchError, match="made for another base"):
            PeftModel.from_pretrained(other, folder)
        assert unchanged(other, before)
    PeftModel.from_pretrained(tiny("llama", seed=9), folder, allow_base_mismatch=True)


# 43 ------------------------------------------------------------------------------------------------------------------


class Trap:
    """Unpickling it touches a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def traps(path):
    """Pickles that run code, in the forms that torch has written, and with the operations that pickle has."""
    tensors = {KEY: torch.ones(4, 16)}
    yield "bare", lambda file: file.write_bytes(pickle.dumps(Trap(path)))
    yield "value", lambda file: torch.save({**tensors, "x": Trap(path)}, file)
    yield "key", lambda file: torch.save({**tensors, (1, Trap(path)): 1}, file)
    yield "legacy", lambda file: torch.save({**tensors, "x": Trap(path)}, file, _use_new_zipfile_serialization=False)
    yield "module", lambda file: torch.save(torch.nn.Linear(2, 2), file)
    program = {
        "inst": b"(S'touch %s'\nios\nsystem\n." % os.fsencode(path),
        "obj": b"(cos\nsystem\nS'touch %s'\no." % os.fsencode(path),
        "newobj": b"\x80\x02cbuiltins\neval\n(S'1'\nt\x81.",
        "build": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}S'x'\nS'y'\nsb.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"Pnonsense\n.",
        "deep": b"\x80\x02" + b"(" * 100_000 + b".",
        "endless": b"\x80\x02" + b"]q\x00h\x00a" * 10 + b".",
        "stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        "dotted": b"\x80\x04\x8c\x0btorch._utils\x8c\x1a_rebuild_tensor_v2.__class\x93.",
    }
    for name, code in program.items():
        yield name, lambda file, code=code: zipped(file, code)


def zipped(file, program, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")


def test_no_pickle_runs_whatever_it_holds(newer, tmp_path):
    (newer / WEIGHTS).unlink()
    trap = tmp_path / "trapped"
    for name, write in traps(trap):
        write(newer / OLDER)
        load_is_refused(newer, (UnsafeError, FormatError), OLDER)  # type: ignore[arg-type]
        assert not trap.exists(), name


def test_a_program_of_random_changes_gives_tensors_or_an_error(newer, tmp_path):
    """Every byte of a good file's program changed, some in many ways: nothing else ever happens."""
    good = tmp_path / "good"
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int64)}, good)
    with zipfile.ZipFile(good) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for place in range(len(entries[name])):
        for value in torch.randint(256, (3,), generator=generator).tolist():
            spoilt = bytearray(entries[name])
            spoilt[place] = value
            with zipfile.ZipFile(tmp_path / "spoilt", "w") as archive:
                for entry, content in {**entries, name: bytes(spoilt)}.items():
                    archive.writestr(entry, content)
            try:
                found, _ = read_zipped(tmp_path / "spoilt")
                assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())
            except (FormatError, UnsafeError, LimitError):
                refused += 1
    assert refused > 100


def test_bombs_are_refused_before_they_unfold(newer, tmp_path):
    (newer / WEIGHTS).unlink()
    zipped(newer / OLDER, b"\0" * 100_000_000, zipfile.ZIP_DEFLATED)
    started = time.monotonic()
    load_is_refused(newer, UnsafeError, "compressed")
    huge = {"x": torch.zeros(1).as_strided((10**6, 10**6), (0, 0))}
    torch.save(huge, newer / OLDER)
    load_is_refused(newer, FormatError, OLDER)
    assert time.monotonic() - started < 60


def test_both_formats_and_nothing_that_says_which(newer):
    torch.save(load_file(newer / WEIGHTS), newer / OLDER)
    load_is_refused(newer, UnsafeError, WEIGHTS, OLDER, "remove the one")


# 44 ------------------------------------------------------------------------------------------------------------------


def test_a_subfolder_that_leads_out(newer, tmp_path):
    adapted(1).save_pretrained(tmp_path / "other")
    for outside in ("../other", "..", str(tmp_path / "other"), "x/../../other"):
        load_is_refused(newer, UnsafeError, "leads out", str(newer), subfolder=outside)


@pytest.mark.skipif(os.name != "posix", reason="symbolic links need rights elsewhere")
def test_a_link_that_leads_out(newer, tmp_path):
    adapted(1).save_pretrained(tmp_path / "other")
    (newer / "inside").symlink_to(tmp_path / "other")
    load_is_refused(newer, UnsafeError, "leads out", subfolder="inside")


# 45 ------------------------------------------------------------------------------------------------------------------


def header(table, body=b""):
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + body


def test_more_tensors_than_any_adapter_has_are_refused_from_the_header_alone(newer):
    junk = {f"t{index}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for index in range(100_001)}
    (newer / WEIGHTS).write_bytes(header(junk))
    load_is_refused(newer, LimitError, "100000", str(newer))
    with open(newer / WEIGHTS, "wb") as file:  # a hole of many gigabytes behind a header that is too long
        file.write(struct.pack("<Q", 60_000_000))
        file.truncate(1 << 36)
    load_is_refused_quickly(newer, LimitError, "60000000")


def load_is_refused_quickly(folder, kind, *words):
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        PeftModel.from_pretrained(tiny("llama"), folder)
    assert all(word in str(caught.value) for word in words) and time.monotonic() - started < 20


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "XX", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [0, 1 << 60], "data_offsets": [0, 0]},
    ],
    ids=["overflow", "negative", "reversed", "dtype", "empty and huge"],
)
def test_shapes_that_cannot_be(newer, entry):
    (newer / WEIGHTS).write_bytes(header({KEY: entry}, b"\0" * (16 if entry["data_offsets"] != [0, 0] else 0)))
    load_is_refused(newer, (FormatError, MismatchError))  # type: ignore[arg-type]


# 46 ------------------------------------------------------------------------------------------------------------------


def test_a_config_that_disagrees_with_the_tensors(folder):
    foreign(folder)
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, "r": 8}))
    model = adapted(7)
    for load in (
        lambda: PeftModel.from_pretrained(tiny("llama"), folder),
        lambda: model.load_adapter(folder, "second"),
    ):
        with refused(MismatchError, "(4, 16)", "(8, 16)", "rank"):
            load()
    assert list(model.peft_config) == ["default"]


def test_a_file_with_other_options_onto_a_name_that_is_there_says_that_those_of_the_model_stay(tmp_path):
    adapted(lora_alpha=32).save_pretrained(tmp_path)
    model = adapted(7)
    with pytest.warns(PeftWarning, match=r"'default' keeps .* lora_alpha=8 \(the file: 32\)"):
        model.load_adapter(tmp_path, "default")
    assert model.get_base_model().model.layers[0].self_attn.q_proj.adapters["default"].scaling == 2


@pytest.mark.parametrize(
    "field,value", [("r", 8), ("lora_alpha", 99), ("use_rslora", True), ("target_modules", ["o_proj"])]
)
def test_a_config_that_disagrees_with_what_the_file_was_saved_with(folder, field, value):
    expected = logits(PeftModel.from_pretrained(tiny("llama"), folder), INPUTS)
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, field: value}))
    with pytest.warns(PeftWarning, match=rf"\['{field}'\] differ .* the saved values are used"):
        model = PeftModel.from_pretrained(tiny("llama"), folder)
    assert torch.equal(logits(model, INPUTS), expected)


# 47 ------------------------------------------------------------------------------------------------------------------


def test_a_load_that_fails_at_any_tensor_leaves_everything_and_a_retry_works(newer, monkeypatch):
    expected = logits(PeftModel.from_pretrained(tiny("llama"), newer), INPUTS)
    base, model = tiny("llama"), adapted(7)
    before, models = state(base), state(model)
    for at in (0, 1, 5, 11):
        for load in (
            lambda: PeftModel.from_pretrained(base, newer),
            lambda: model.load_adapter(newer, "second"),
            lambda: model.load_adapter(newer, "default"),
        ):
            with failing(monkeypatch, torch.Tensor, "copy_", at, MemoryError("no room")), pytest.raises(MemoryError):
                load()
            assert unchanged(base, before) and unchanged(model, models) and list(model.peft_config) == ["default"]
    assert torch.equal(logits(PeftModel.from_pretrained(base, newer), INPUTS), expected)
    model.load_adapter(newer, "second")
    model.set_adapter("second")
    assert torch.equal(logits(model, INPUTS), expected)


# 48 ------------------------------------------------------------------------------------------------------------------


def test_a_file_that_is_overwritten_or_cut_while_the_adapter_serves(folder):
    model = PeftModel.from_pretrained(tiny("llama"), folder, low_cpu_mem_usage=True)
    expected = logits(model, INPUTS)
    with open(weights(folder), "r+b") as file:
        file.write(b"\0" * 4000)
        file.truncate(4000)
    assert torch.equal(logits(model, INPUTS), expected)
    shutil.rmtree(folder)
    assert torch.equal(logits(model, INPUTS), expected)


# 49 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["nowhere", "config"])
def test_a_base_with_code_of_its_own_does_not_run_it(tmp_path, where):
    base, trap = tmp_path / "base", tmp_path / "trapped"
    base.mkdir()
    (base / "modeling_trap.py").write_text(f"open({str(trap)!r}, 'w').close()\n")
    mapping = {"AutoConfig": "modeling_trap.Config", "AutoModelForCausalLM": "modeling_trap.Model"}
    (base / "config.json").write_text(json.dumps({"model_type": "trap", "auto_map": mapping}))
    get_peft_model(tiny("llama"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    values = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    flag = {"trust_remote_code": True} if where == "config" else {}
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps({**values, "base_model_name_or_path": str(base), **flag}))
    with pytest.warns(PeftWarning) if flag else pytest.raises(ValueError):
        with pytest.raises(ValueError, match="trust_remote_code"):
            AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        if not flag:
            raise ValueError
    assert not trap.exists()


# 50 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="named pipes are POSIX's")
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_pipe_a_folder_or_a_device_in_place_of_a_file_is_not_waited_for(newer, name):
    (newer / name).unlink()
    os.mkfifo(newer / name)
    load_is_refused_at(newer, name, "no file that can be read")
    (newer / name).unlink()
    (newer / name).mkdir()
    load_is_refused_at(newer, name, "no file that can be read")
    (newer / name).rmdir()
    (newer / name).symlink_to("/dev/zero")
    load_is_refused_at(newer, name, "no file that can be read")
    (newer / name).unlink()
    (newer / name).symlink_to(newer / "nothing")
    load_is_refused_at(newer, name, "has no")


def load_is_refused_at(folder, name, words):
    before = tiny("llama")
    with refused(FormatError, name, words):
        PeftModel.from_pretrained(before, folder)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser reads everything")
def test_a_file_that_may_not_be_read(newer):
    (newer / WEIGHTS).chmod(0)
    load_is_refused(newer, FormatError, WEIGHTS, "denied")
