"""Several processes do what one does: losses, the adapter, its files, and resuming in another number of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deltatune.errors import ConfigError
from deltatune.train import checkpoint as checkpoints
from deltatune.train import train
from tests.train.test_resume import BreakAt, Notices, Stop

CREW = Path(__file__).with_name("crew.py")
pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs fork and a torch with gloo",
)
# 24 rows, 6 of them for evaluation: the last step of an epoch has 2 of 4, so that one process gets less than a batch
ONE = {"eval_split": 0.25, "eval_steps": 3, "save_steps": 2, "logging_steps": 1, "max_steps": 6}
TWO = {**ONE, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2}


def crew(folder: Path, jobs: list[dict[str, Any]], count: int = 2, limit: int = 240) -> dict[str, Any]:
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, str(CREW), str(file), str(count), str(limit)],
        capture_output=True, text=True, timeout=limit + 60, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "stderr": done.stderr}


def job(
    settings: Any, output: Path, *, break_at: int | None = None, kill: Any = None, machines: int = 1, **changes: Any
) -> dict[str, Any]:
    task = changes.pop("task", "causal")
    made = settings(task, output_dir=str(output), **changes).model_dump(mode="json")
    return {"settings": made, "break_at": break_at, "kill": kill, "machines": machines}


def losses(output: Path, key: str = "loss") -> list[float]:
    entries = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
    return [entry[key] for entry in entries if key in entry]


def same(one: Path, other: Path) -> None:
    a, b = load_file(one / "adapter_model.safetensors"), load_file(other / "adapter_model.safetensors")
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        torch.testing.assert_close(b[key], tensor, rtol=1e-4, atol=1e-5, msg=key)
    assert losses(other) == pytest.approx(losses(one), abs=1e-5)
    assert losses(other, "eval_loss") == pytest.approx(losses(one, "eval_loss"), abs=1e-5)


def check_processes(profile: str, settings: Any, tmp_path: Path) -> None:
    """One process and two, each alone and going on where the other left off, all end at the same adapter."""
    whole, mine = tmp_path / "whole", tmp_path / "one-two"
    train(settings("causal", output_dir=str(whole), **ONE))
    with pytest.raises(Stop):
        train(settings("causal", output_dir=str(mine), **ONE), callbacks=[BreakAt(3)])
    two, theirs, exact = tmp_path / "two", tmp_path / "two-one", tmp_path / "two-two"
    told = crew(
        tmp_path,
        [
            job(settings, two, profile=profile, **TWO),
            job(settings, theirs, profile=profile, break_at=5, **TWO),
            # started as one process was: the rows of a step are kept, whatever the settings of a batch say
            job(settings, mine, profile=profile, resume_from_checkpoint=True, **ONE),
            job(settings, exact, profile=profile, break_at=3, **TWO),
            job(settings, exact, profile=profile, resume_from_checkpoint=True, **TWO),
        ],
    )
    exits = [[part["exit"] for part in process] for process in told["told"]]
    assert exits[0] == exits[1] == ["done", "KeyError: 'broken off'", "done", "KeyError: 'broken off'", "done"]
    first, second = told["told"]
    assert [part["losses"] for part in first] == [part["losses"] for part in second]
    assert "keep the 4 rows of a step" in " ".join(first[2]["notices"])
    assert "Warning" not in told["stderr"], told["stderr"]

    notices = Notices()
    result = train(settings("causal", output_dir=str(theirs), resume_from_checkpoint=True, **TWO), callbacks=[notices])
    assert result.resumed_from == theirs / "checkpoint-4"
    assert "2 processes then, 1 now" in " ".join(notices.texts)
    for output in (two, mine, theirs, exact):
        same(whole, output)
    assert (two / "adapter_model.safetensors").read_bytes() == (exact / "adapter_model.safetensors").read_bytes()
    # written once, by one of them, and nothing else left behind
    assert {path.name for path in two.iterdir()} == {path.name for path in whole.iterdir()}
    assert not list(two.glob(".*"))
    assert all(checkpoints.problem(path) is None for _, path in checkpoints.listed(two))


def test_two_processes_learn_what_one_does_and_go_on_where_the_other_left_off(settings, tmp_path):
    check_processes("ddp", settings, tmp_path)


def check_kill(profile: str, settings: Any, tmp_path: Path) -> None:
    """The process that is left ends with an error that says so, and what it had saved goes on to the same end."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    told = crew(tmp_path, [job(settings, killed, profile=profile, kill=[1, 3], **TWO)], limit=120)
    assert told["codes"] == [0, -9]
    assert told["told"][1] is None
    exit = told["told"][0][0]["exit"]
    assert exit.startswith("TrainError: another process of this run has ended"), exit
    assert exit.endswith("last good checkpoint: " + str(killed / "checkpoint-2")), exit
    assert not (killed / "metrics.json").exists()
    jobs = [
        job(settings, killed, profile=profile, resume_from_checkpoint=True, **TWO),
        job(settings, whole, profile=profile, **TWO),
    ]
    assert [part["exit"] for part in crew(tmp_path, jobs)["told"][0]] == ["done", "done"]
    same(whole, killed)
    assert (whole / "adapter_model.safetensors").read_bytes() == (killed / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_run_can_go_on(settings, tmp_path):
    check_kill("ddp", settings, tmp_path)


@pytest.mark.slow
def test_processes_drop_out_different_things_and_go_on_exactly(settings, tmp_path):
    """With dropout a resumed run of two processes has to put back the random states of both."""
    changes = {**TWO, "lora_dropout": 0.3}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    jobs = [
        job(settings, whole, **changes),
        job(settings, broken, break_at=3, **changes),
        job(settings, broken, resume_from_checkpoint=True, **changes),
    ]
    told = crew(tmp_path, jobs)
    assert [part["exit"] for part in told["told"][1]] == ["done", "KeyError: 'broken off'", "done"]
    assert (whole / "adapter_model.safetensors").read_bytes() == (broken / "adapter_model.safetensors").read_bytes()
    kept = checkpoints.read(whole / "checkpoint-6").tensors["random"]
    assert not kept["torch"].equal(kept["process.1.torch"])


METHODS = {
    "adalora": {"init_r": 4, "target_r": 2},  # a schedule that reads gradients
    "prefix_tuning": {"num_virtual_tokens": 3},
    "vera": {"r": 4},  # tensors that layers share
    "full": {},
}


@pytest.mark.slow
def test_other_methods_in_two_processes(settings, tmp_path):
    def changes(base: dict[str, Any], method: str) -> dict[str, Any]:
        return {**base, "method": method, **METHODS[method]}

    for method in METHODS:
        train(settings("causal", output_dir=str(tmp_path / method), **changes(ONE, method)))
    told = crew(tmp_path, [job(settings, tmp_path / f"{name}-two", **changes(TWO, name)) for name in METHODS])
    assert [part["exit"] for part in told["told"][0]] == ["done"] * len(METHODS)
    for method in METHODS:
        one, two = tmp_path / method, tmp_path / f"{method}-two"
        assert losses(two) == pytest.approx(losses(one), abs=1e-5), method
        name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
        a, b = load_file(one / name), load_file(two / name)
        assert a.keys() == b.keys()
        assert all(torch.allclose(a[key], b[key], rtol=1e-3, atol=1e-4) for key in a), method


@pytest.mark.parametrize(
    ("environment", "profile", "told"),
    [
        ({"WORLD_SIZE": "2"}, "single", "profile='single' is not allowed in 2 processes"),
        ({}, "ddp", "profile='ddp' needs processes: deltatune train --launcher torchrun"),
        ({"ACCELERATE_USE_FSDP": "true"}, "auto", "accelerate's configuration asks for FSDP"),
    ],
)
def test_a_profile_that_the_processes_do_not_allow_is_refused_at_once(
    environment, profile, told, settings, tmp_path, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=told):
        train(settings("causal", profile=profile))
    assert not (tmp_path / "out").exists()
