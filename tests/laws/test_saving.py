"""Saving that fails, at whatever step, leaves an adapter that loads and nothing else behind."""

import json
import os
import pathlib
import shutil

import pytest
import torch

from deltatune import PeftModel
from deltatune.errors import PeftError, SaveError
from tests.laws.examples import BASES, LAYER_METHODS, Case, Holder, move

METHODS = list(LAYER_METHODS)


@pytest.mark.parametrize("operation", ["write", "fsync", "replace", "chmod"])
@pytest.mark.parametrize("name", METHODS[:1])  # writing does not know the method
def test_saving_that_fails_anywhere_leaves_an_adapter_that_loads(name, operation, tmp_path, monkeypatch):
    """Every kth call of an operation fails once; afterwards the folder holds the old adapter, or there was no error."""
    case = Case(name, "default", "linear")
    old, new, x = case.model(), case.model(), case.batch()
    move(new)
    old.peft_config["default"].base_model_name_or_path = "old"
    new.peft_config["default"].base_model_name_or_path = "new"
    outputs = [old(x), new(x)]
    folder = tmp_path / "adapter"
    failures = 0
    for k in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        old.save_pretrained(folder)
        files = sorted(path.name for path in folder.iterdir())
        with monkeypatch.context() as patch:
            fail_at(patch, operation, k)
            try:
                new.save_pretrained(folder)
                failed = False
            except SaveError as error:
                failed = True
                assert str(folder) in str(error) and "\n" not in str(error)
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(Holder(BASES["linear"].make()).eval(), folder)
        assert any(torch.equal(loaded(x), expected) for expected in outputs)
        assert sorted(path.name for path in folder.iterdir()) == files, "left-overs"
        if not failed:
            assert torch.equal(loaded(x), outputs[1])
            break
        failures += 1
        assert torch.equal(loaded(x), outputs[0]), "an error means that nothing changed"
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "old"
    assert not failed and (failures > 1 or operation == "fsync")


def fail_at(patch, operation, k):
    count = iter(range(999))

    def failing(real):
        def call(*args, **kwargs):
            if next(count) == k:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        return call

    if operation == "write":
        real_open = open

        def opening(file, mode="r", *args, **kwargs):
            handle = real_open(file, mode, *args, **kwargs)
            if "x" in mode or "w" in mode:
                return _Failing(handle, failing)
            return handle

        patch.setattr("builtins.open", opening)
    elif operation == "chmod":
        patch.setattr(pathlib.Path, "chmod", failing(pathlib.Path.chmod))
    else:
        patch.setattr(os, operation, failing(getattr(os, operation)))


class _Failing:
    """A file whose `write` may fail half way."""

    def __init__(self, handle, failing) -> None:
        self.handle, self.failing = handle, failing

    def write(self, content):
        def whole(content):
            return self.handle.write(content)

        try:
            return self.failing(whole)(content)
        except OSError:
            self.handle.write(content[: len(content) // 2])
            raise

    def __getattr__(self, name):
        return getattr(self.handle, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.handle.close()


@pytest.mark.parametrize("name", METHODS)
def test_saving_to_where_nothing_can_be_saved(name, tmp_path):
    model = Case(name, "default", "linear").model()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SaveError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(SaveError):
        model.save_pretrained(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", METHODS)
def test_a_config_that_cannot_be_written_leaves_the_old_files(name, tmp_path):
    model = Case(name, "default", "linear").model()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.peft_config["default"].base_model_name_or_path = object()
    with pytest.raises((PeftError, TypeError)):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert json.loads(before["adapter_config.json"])["peft_type"]
