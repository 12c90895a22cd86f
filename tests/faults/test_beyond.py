"""Faults that the matrix does not list, found by trying."""

import os
import signal
import threading
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltatune import LoraConfig, PeftModel
from deltatune.errors import AdapterNameError, MergeError, PeftError, SaveError
from deltatune.functional import set_adapter
from deltatune.inject import adapted_layers
from deltatune.storage.files import write_files
from tests.core.tiny import logits, tiny
from tests.faults.disk import in_child
from tests.faults.folders import CONFIG, INPUTS, WEIGHTS, adapted, failing, refused, state, unchanged

POSIX = pytest.mark.skipif(os.name != "posix", reason="pipes and fork are POSIX's")


@POSIX
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("through_link", [False, True])
def test_a_pipe_where_a_file_should_be_is_neither_waited_for_nor_replaced(tmp_path, name, through_link):
    """Through a link it was the device itself that a save replaced."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    pipe = tmp_path / "pipe" if through_link else folder / name
    os.mkfifo(pipe)
    if through_link:
        (folder / name).symlink_to(pipe)

    def save():
        signal.alarm(60)
        with refused(SaveError, str(folder / name), "a device or a pipe"):
            adapted(1).save_pretrained(folder)

    assert in_child(save) == 0
    assert pipe.is_fifo() and [path.name for path in folder.iterdir()] == [name]


def test_a_name_too_long_for_the_file_system(tmp_path):
    with refused(SaveError, "too long", "xxx"):
        adapted().save_pretrained(tmp_path / ("x" * 300))


def test_a_path_that_is_empty_is_not_the_folder_one_happens_to_be_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused(SaveError, "save_directory=''"):
        adapted().save_pretrained("")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_an_interrupt_leaves_old_or_new_and_nothing_beside_them(tmp_path, monkeypatch, operation, at):
    old = {"a": b"old", "b": b"old"}
    write_files(tmp_path, old)
    with failing(monkeypatch, os, operation, at, KeyboardInterrupt()):
        try:
            write_files(tmp_path, {"a": b"new", "b": b"new"})
        except KeyboardInterrupt:
            pass
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found in (old, {"a": b"new", "b": b"new"})
    write_files(tmp_path, old)  # the lock is free


def test_an_interrupt_just_after_the_last_file_is_in_place_keeps_the_new_ones(tmp_path, monkeypatch):
    write_files(tmp_path, {"a": b"old", "b": b"old"})
    replace = os.replace

    def then_interrupted(source, target):
        replace(source, target)
        if str(target).endswith("b"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", then_interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_files(tmp_path, {"a": b"new", "b": b"new"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"new", "b": b"new"}


@POSIX
def test_a_process_forked_during_a_pass_of_another_thread_can_change_its_adapters():
    model, inside, go = adapted(1), threading.Event(), threading.Event()

    def hook(*_):
        inside.set()
        assert go.wait(120)

    handle = model.get_base_model().lm_head.register_forward_hook(hook)
    other = threading.Thread(target=logits, args=(model, INPUTS))
    other.start()
    assert inside.wait(60)

    def child():
        signal.alarm(60)
        handle.remove()
        model.add_adapter("second", LoraConfig(r=2))
        model.set_adapter("second")
        logits(model, INPUTS)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork beside threads
            assert in_child(child) == 0
    finally:
        go.set()
        other.join(60)
    assert list(model.peft_config) == ["default"]


def test_weights_whose_sum_is_infinite_are_refused():
    model = adapted(1)
    model.add_adapter("second", LoraConfig(r=4))
    before = state(model)
    with refused(MergeError, "not finite"):
        model.add_weighted_adapter(["default", "second"], [1e308, 1e308], "sum")
    assert unchanged(model, before) and "sum" not in model.peft_config


def test_odd_names_of_folders(tmp_path):
    names = ["ünï 中文 \u202e x", "a\nb", "%s {x} $HOME", *([os.fsdecode(b"\xff\xfe")] if os.name == "posix" else [])]
    model = adapted(1)
    for name in names:
        model.save_pretrained(tmp_path / name)
        assert torch.equal(
            logits(PeftModel.from_pretrained(tiny("llama"), tmp_path / name), INPUTS), logits(model, INPUTS)
        )


def test_tensors_that_are_views_and_parameters_in_the_older_format(tmp_path):
    model = adapted(1)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    for change in (lambda t: t.t().contiguous().t(), torch.nn.Parameter, lambda t: torch.cat([t, t])[: len(t)]):
        torch.save({key: change(tensor) for key, tensor in tensors.items()}, tmp_path / "adapter_model.bin")
        found = PeftModel.from_pretrained(tiny("llama"), tmp_path)
        assert torch.equal(logits(found, INPUTS), logits(model, INPUTS))


def test_a_download_that_did_not_end_or_is_in_pieces(tmp_path):
    adapted(1).save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / f"{WEIGHTS}.incomplete")
    with refused(PeftError, str(tmp_path), WEIGHTS):
        PeftModel.from_pretrained(tiny("llama"), tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model-00001-of-00002.safetensors")
    (tmp_path / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a')
    with refused(PeftError, str(tmp_path), WEIGHTS):
        PeftModel.from_pretrained(tiny("llama"), tmp_path)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.set_adapter(["default", "second", "default"]),
        lambda model: model.base_model.set_adapter(["default", "default"]),
        lambda model: set_adapter(model, ["default", "default"]),
        lambda model: model.merge_adapter(["second", "second"]),
        lambda model: model.merge_and_unload(adapter_names=["second", "second"]),
    ],
)
def test_an_adapter_that_is_named_twice_would_act_twice(call):
    model = adapted(1)
    model.add_adapter("second", LoraConfig(r=4))
    before, active = state(model), model.active_adapters
    with refused(AdapterNameError, "named 2 times"):
        call(model)
    assert unchanged(model, before) and model.active_adapters == active


@pytest.mark.parametrize("of", ["base", "adapter"])
def test_merging_numbers_that_are_not_there(of):
    model = adapted(1)
    path, layer = next(adapted_layers(model.get_base_model()))
    (layer.base_layer if of == "base" else layer.adapters["default"]).to("meta")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with refused(MergeError, path, "meta device"):
            merge()
    assert not any(layer.merged for _, layer in adapted_layers(model.get_base_model()))
