"""A checkpoint is whole or not there, whatever interrupts its writing."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from deltatune.errors import ResumeError, SaveError
from deltatune.train import checkpoint as checkpoints
from deltatune.train.checkpoint import Checkpoint


class PowerCut(BaseException):
    """Nothing in the code under test catches it but clean-up, which a power cut does not run either."""


def a_checkpoint(value: float) -> Checkpoint:
    tensors = {group: {"w": torch.full((3,), value)} for group in checkpoints.TENSORS}
    return Checkpoint(tensors, {"progress": {"step": int(value)}})


def value_of(folder: Path) -> float:
    return float(checkpoints.read(folder).tensors["trainable"]["w"][0])


def cut_at(number: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The `number`-th call of these and all later ones fail, removal included: the process is dead."""
    count = [0]

    def dying(call):
        def counted(*args, **kwargs):
            count[0] += 1
            if count[0] >= number:
                raise PowerCut
            return call(*args, **kwargs)

        return counted

    for name in ("fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    monkeypatch.setattr(checkpoints.shutil, "rmtree", dying(checkpoints.shutil.rmtree))
    return count


def operations_of_a_write(tmp_path: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        count = cut_at(10**6, patch)
        checkpoints.write(tmp_path / "count", 2, a_checkpoint(2))
        checkpoints.rotate(tmp_path / "count", 1, None)
        return count[0]


def test_death_at_any_operation_leaves_the_old_or_the_new_checkpoint(tmp_path):
    total = operations_of_a_write(tmp_path)
    assert total >= 7  # four files, the manifest, the folder, the rename at least
    seen = set()
    for number in range(1, total + 3):  # rotation of two checkpoints has a rename and a removal more
        output = tmp_path / str(number)
        checkpoints.write(output, 1, a_checkpoint(1))
        with pytest.MonkeyPatch.context() as patch:
            cut_at(number, patch)
            try:
                checkpoints.write(output, 2, a_checkpoint(2))
                checkpoints.rotate(output, 1, None)
            except PowerCut:
                pass
        newest = checkpoints.newest(output)
        assert newest is not None
        assert value_of(newest) == int(newest.name.split("-")[1])
        seen.add(newest.name)
        checkpoints.write(output, 3, a_checkpoint(3))  # the next run goes on, and clears up
        checkpoints.rotate(output, 1, None)
        assert [path.name for path in output.iterdir()] == ["checkpoint-3"]
    assert seen == {"checkpoint-1", "checkpoint-2"}


def test_writing_the_same_step_again_replaces_it(tmp_path):
    checkpoints.write(tmp_path, 1, a_checkpoint(5))
    checkpoints.write(tmp_path, 1, a_checkpoint(6))
    assert value_of(tmp_path / "checkpoint-1") == 6
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_full_disk_leaves_the_previous_checkpoint_and_says_so(tmp_path, monkeypatch):
    checkpoints.write(tmp_path, 1, a_checkpoint(1))

    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SaveError, match=r"checkpoint-2.*No space left on device.*earlier ones are untouched"):
        checkpoints.write(tmp_path, 2, a_checkpoint(2))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert value_of(tmp_path / "checkpoint-1") == 1


def test_rotation_keeps_the_best_and_the_last(tmp_path):
    for step in (1, 2, 3, 10):
        checkpoints.write(tmp_path, step, a_checkpoint(step))
    checkpoints.rotate(tmp_path, 2, best=1)
    assert [step for step, _ in checkpoints.listed(tmp_path)] == [1, 10]
    checkpoints.rotate(tmp_path, 1, best=1)  # both stay, even where only one is asked for
    assert [step for step, _ in checkpoints.listed(tmp_path)] == [1, 10]


def test_order_is_by_step_and_not_by_time(tmp_path):
    for step in (10, 9):
        checkpoints.write(tmp_path, step, a_checkpoint(step))
    os.utime(tmp_path / "checkpoint-10", (0, 0))
    found = checkpoints.newest(tmp_path)
    assert found is not None and found.name == "checkpoint-10"


def test_folders_of_other_programs_are_neither_read_nor_removed(tmp_path):
    foreign = tmp_path / "checkpoint-5"
    foreign.mkdir()
    (foreign / "optimizer.pt").write_bytes(b"a pickle")
    checkpoints.write(tmp_path, 1, a_checkpoint(1))
    checkpoints.write(tmp_path, 2, a_checkpoint(2))
    checkpoints.rotate(tmp_path, 1, None)
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-2"
    checkpoints.remove_all(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format": 9, "files": {}}', "format 9"),
        ('{"format": 1, "files": {}}', "does not list trainable.safetensors"),
    ],
)
def test_a_broken_manifest_is_told(manifest, reason, tmp_path):
    folder = checkpoints.write(tmp_path, 1, a_checkpoint(1))
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(ResumeError, match=reason):
        checkpoints.read(folder)


def test_values_survive_exactly(tmp_path):
    taken = a_checkpoint(1)
    taken.tensors["trainable"]["w"] = torch.tensor([0.1, -0.0, 1e-42, 3e38])
    taken.state["progress"]["loss"] = 0.1 + 0.2
    back = checkpoints.read(checkpoints.write(tmp_path, 1, taken))
    assert back.tensors["trainable"]["w"].view(torch.int32).equal(taken.tensors["trainable"]["w"].view(torch.int32))
    assert json.dumps(back.state) == json.dumps(taken.state)
