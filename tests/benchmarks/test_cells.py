"""Cells: what was run is not run again, what changed is, and no file is ever half written."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
from harness.cells import Cell, Spec, Store

from deltatune.errors import DataError, SaveError

SPEC = Spec("bench", "task", "lora", 0, {"max_steps": 10}, {"learning_rate": 1e-3, "r": 8}, {"train": "abc"})


def cell(spec=SPEC):
    return Cell(spec, {"test": {"accuracy": 0.5}}, {"threads": 1})


def test_a_cell_comes_back_as_it_was_put(tmp_path):
    store = Store(tmp_path / "cells")
    assert store.get(SPEC) is None
    path = store.put(cell())
    assert store.get(SPEC) == cell()
    assert path.name.startswith("task-lora-seed0-")
    assert json.loads(path.read_text())["spec"]["hyper"] == {"learning_rate": 1e-3, "r": 8}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"method": "full"},
        {"task": "other"},
        {"budget": {"max_steps": 11}},
        {"hyper": {"learning_rate": 1e-3, "r": 9}},
        {"inputs": {"train": "abd"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_change_of_the_spec_is_another_cell_and_leaves_the_old_one(tmp_path, change):
    store = Store(tmp_path)
    store.put(cell())
    assert store.get(dataclasses.replace(SPEC, **change)) is None
    assert store.get(SPEC) is not None


def test_the_order_of_keys_does_not_matter(tmp_path):
    store = Store(tmp_path)
    store.put(cell())
    assert store.get(dataclasses.replace(SPEC, hyper={"r": 8, "learning_rate": 1e-3})) is not None


def test_a_crash_while_writing_leaves_no_cell_and_no_leftovers(tmp_path, monkeypatch):
    store = Store(tmp_path)

    def full_disk(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(SaveError, match="No space left"):
        store.put(cell())
    monkeypatch.undo()
    assert store.get(SPEC) is None
    assert list(tmp_path.iterdir()) == []


def test_a_crash_while_writing_again_keeps_the_old_cell(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.put(cell())
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(SaveError):
        store.put(dataclasses.replace(cell(), result={"test": {"accuracy": 0.9}}))
    monkeypatch.undo()
    assert store.get(SPEC) == cell()


def test_a_broken_file_is_refused_by_name(tmp_path):
    store = Store(tmp_path)
    path = store.put(cell())
    path.write_text(path.read_text()[:40])
    with pytest.raises(DataError, match=f"{path.name}.*delete it"):
        store.get(SPEC)


def test_a_file_whose_spec_was_edited_is_refused(tmp_path):
    store = Store(tmp_path)
    path = store.put(cell())
    path.write_text(path.read_text().replace('"r": 8', '"r": 80'))
    with pytest.raises(DataError, match="does not belong to its name"):
        store.get(SPEC)
