"""Faults of a training run beyond the usual ones; the numbers are those of the fault matrix."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from deltatune.cli.failures import explain
from deltatune.errors import ConfigError, ResumeError, SaveError
from deltatune.train import checkpoint as checkpoints
from deltatune.train import train
from deltatune.train.lock import LOCK, OWNER
from deltatune.train.signals import StopSignals
from tests.faults.folders import failing
from tests.train.test_checkpoint import a_checkpoint, value_of
from tests.train.test_resume import DROPOUT_AND_ACCUMULATION, BreakAt, Stop, nursery, raw

# 71 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("seed", [1, 2])
def test_many_kills_end_in_the_same_bits(seed, settings, tmp_path):
    told = nursery(tmp_path, raw(settings, **DROPOUT_AND_ACCUMULATION), str(seed), "50")
    assert told["kills"] == 50 and told["digest"] == told["whole"]


# 72 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize(
    ("owner", "operation"), [(Path, "write_bytes"), (Path, "write_text"), (os, "fsync"), (os, "rename")]
)
def test_a_disk_that_fails_at_any_operation_leaves_a_whole_checkpoint(owner, operation, code, tmp_path, monkeypatch):
    for at in range(8):
        output = tmp_path / str(at)
        checkpoints.write(output, 1, a_checkpoint(1))
        with failing(monkeypatch, owner, operation, at, OSError(code, os.strerror(code))):
            try:
                checkpoints.write(output, 2, a_checkpoint(2))
            except SaveError as error:
                assert os.strerror(code) in str(error) and "checkpoint-2" in str(error)
                assert explain(error)[0] == 4
        assert value_of(output / "checkpoint-1") == 1 and not list(output.glob("*.tmp")) + list(output.glob(".*"))
        assert checkpoints.newest(output) in (output / "checkpoint-1", output / "checkpoint-2")
        checkpoints.write(output, 2, a_checkpoint(3))
        assert value_of(output / "checkpoint-2") == 3


# 73 ------------------------------------------------------------------------------------------------------------------


def test_the_command_ends_with_the_code_of_the_signal_and_a_checkpoint(settings, tmp_path):
    file = tmp_path / "run.json"
    values = settings(max_steps=100_000, save_steps=0, eval_split=0.0).model_dump(mode="json", exclude_unset=True)
    file.write_text(json.dumps(values))
    code = "import sys; from deltatune.cli import main; main(sys.argv[1:])"
    child = subprocess.Popen(
        [sys.executable, "-c", code, "train", str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    history = tmp_path / "out" / "history.jsonl"
    deadline = time.monotonic() + 120
    while not (history.is_file() and history.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 143, said
    kept = checkpoints.newest(tmp_path / "out")
    assert kept is not None and str(kept) in said.splitlines()[-1] and "Traceback" not in said


def test_a_second_signal_ends_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts behind itself ignores it
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.received == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, before)


# 76 ------------------------------------------------------------------------------------------------------------------


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def broken_off(settings, step=3, **changes):
    with pytest.raises(Stop):
        train(settings(save_steps=1, **changes), callbacks=[BreakAt(step)])


def test_a_pickle_in_a_checkpoint_is_never_opened(settings, tmp_path):
    broken_off(settings)
    kept, trapped = checkpoints.newest(tmp_path / "out"), tmp_path / "trapped"
    assert kept is not None
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"):
        (kept / name).write_bytes(pickle.dumps(Trap(trapped)))
    result = train(settings(save_steps=1, resume_from_checkpoint=True))
    assert result.resumed_from == kept and not trapped.exists()


# 80 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": float("nan")},
        {"learning_rate": 0},
        {"learning_rate": 1e30},
        {"weight_decay": -1},
        {"weight_decay": float("nan")},
        {"warmup_ratio": 1.5},
        {"warmup_ratio": float("nan")},
        {"max_grad_norm": float("nan")},
        {"max_grad_norm": -1},
        {"num_train_epochs": -2},
        {"num_train_epochs": float("inf")},
        {"gradient_accumulation_steps": 0},
        {"per_device_train_batch_size": 1.5},
        {"max_steps": 0},
        {"seed": -1},
        {"seed": 2**70},
        {"save_total_limit": 0},
        {"num_threads": 0},
        {"max_length": 0},
        {"eval_split": 1.0},
        {"eval_split": float("nan")},
        {"early_stopping_patience": 0},
        {"lora_dropout": float("nan")},
        {"lora_alpha": float("inf")},
        {"r": True},
    ],
    ids=str,
)
def test_numbers_that_no_run_can_have(changes, settings, tmp_path):
    with pytest.raises(ConfigError) as caught:
        train(settings(**changes))
    assert next(iter(changes)) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_fewer_steps_than_have_been_made(settings, tmp_path):
    broken_off(settings)
    before = checkpoints.newest(tmp_path / "out")
    with pytest.raises(ResumeError, match="max_steps"):
        train(settings(save_steps=1, max_steps=1, resume_from_checkpoint=True))
    with pytest.raises(ResumeError, match=r"checkpoint-\d has made \d steps, more than the 1 of this run.*max_steps"):
        train(settings(save_steps=1, max_steps=1, resume_from_checkpoint=True, allow_change=["max_steps"]))
    assert checkpoints.newest(tmp_path / "out") == before


# 81 ------------------------------------------------------------------------------------------------------------------


def test_a_lock_left_by_a_killed_run_is_no_lock(settings, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).touch()
    (tmp_path / "out" / OWNER).write_text("999999")
    train(settings(max_steps=1))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / LOCK).exists() and torch.get_num_threads() >= 1
