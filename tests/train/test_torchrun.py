"""`deltatune train --launcher torchrun`, from the command to its exit code: a killed process, a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from deltatune.train import checkpoint as checkpoints
from tests.train.test_processes import losses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.name != "posix" or not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="needs signals and a torch with gloo",
    ),
]
LIMIT = 240.0  # seconds, after which nothing of a broken test is left


def command(settings: Any, output: Path, **changes: Any) -> list[str]:
    asked = settings("causal", output_dir=str(output), per_device_train_batch_size=1, **changes)
    values = asked.model_dump(mode="json", exclude_unset=True)
    words = [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()
             if key not in ("method_options", "report_to")]  # fmt: skip
    return [sys.executable, "-m", "deltatune.cli", "train", "--launcher", "torchrun", "--nproc_per_node", "2", *words]


@contextmanager
def started(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with open(log, "wb") as file:
        launcher = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield launcher
    finally:
        for process in [*_below(launcher), launcher]:
            if process.poll() is None if isinstance(process, subprocess.Popen) else process.is_running():
                process.kill()
        launcher.wait()


def _below(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(launcher.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def workers(launcher: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    """By their rank, which torchrun tells them."""
    found = {process.environ().get("RANK"): process for process in _below(launcher)}
    return {int(rank): process for rank, process in found.items() if rank is not None}


def wait_for_steps(output: Path, launcher: subprocess.Popen[bytes], log: Path, steps: int = 2) -> None:
    until = time.monotonic() + LIMIT
    while not (output / "history.jsonl").exists() or len(losses(output)) < steps:
        assert launcher.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < until, "no step was made"
        time.sleep(0.1)


@pytest.mark.parametrize("profile", ["ddp", "fsdp2"])
def test_a_killed_process_ends_the_command_with_code_5_and_the_next_command_goes_on(profile, settings, tmp_path):
    output, log = tmp_path / "out", tmp_path / "log"
    words = command(settings, output, profile=profile, max_steps=100_000, save_steps=2, logging_steps=1)
    with started(words, log) as launcher:
        wait_for_steps(output, launcher, log, 4)
        workers(launcher)[1].kill()
        code = launcher.wait(LIMIT)
    told = log.read_text()
    assert code == 5, told[-3000:]
    assert "another process of this run has ended" in told or "process 1 was ended by SIGKILL" in told, told[-3000:]
    assert "resume_from_checkpoint: true" in told and "Traceback" not in told, told[-3000:]
    (step, _), *_ = reversed([found for found in checkpoints.listed(output) if checkpoints.problem(found[1]) is None])
    again = command(settings, output, profile=profile, max_steps=step + 2, save_steps=2, logging_steps=1)
    done = subprocess.run(
        [*again, "--resume_from_checkpoint=true", "--allow_change=max_steps"],
        capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (output / "adapter_model.safetensors").is_file()
    assert checkpoints.listed(output)[-1][0] == step + 2


def test_a_signal_to_the_command_leaves_a_checkpoint_of_the_last_step(settings, tmp_path):
    output, log = tmp_path / "out", tmp_path / "log"
    with started(command(settings, output, max_steps=100_000, save_steps=0, logging_steps=1), log) as launcher:
        wait_for_steps(output, launcher, log)
        launcher.send_signal(signal.SIGTERM)
        code = launcher.wait(LIMIT)
    told = log.read_text()
    assert code == 143, told[-3000:]
    assert "Traceback" not in told, told[-3000:]
    ((step, folder),) = checkpoints.listed(output)
    assert checkpoints.problem(folder) is None
    assert step == len(losses(output)) >= 2
