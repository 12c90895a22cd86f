"""Runs trainings in forked processes that meet through gloo: a script, because one import serves all of them.

python crew.py JOBS.json PROCESSES SECONDS

A job is {"settings": ..., "break_at": step or null, "kill": [process, step] or null, "machines": number}. Prints one
JSON line: for each job and process the exit of its training ("done", or the error's class and message), its losses, and
which share of the numbers in shards it holds (1.0: there are none). A killed process says nothing, and ends the list of
jobs.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from deltatune.train import Listener, TrainSettings, train


class Watch(Listener):
    """Keeps losses and notices; breaks the run off after a step, or kills this process."""

    def __init__(self, break_at: int | None, kill_at: int | None) -> None:
        self.break_at, self.kill_at = break_at, kill_at
        self.losses: list[float] = []
        self.evaluated: list[float] = []
        self.notices: list[str] = []

    def on_notice(self, text: str) -> None:
        self.notices.append(text)

    def on_step(self, progress: Any) -> None:
        self.losses.append(progress.loss)
        if progress.step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if progress.step == self.break_at:
            raise KeyError("broken off")

    def on_evaluate(self, evaluation: Any) -> None:
        self.evaluated.append(evaluation.scores["loss"])


def share_held(model: Any) -> float:
    from torch.distributed.tensor import DTensor

    partitioned = [p for p in model.parameters() if hasattr(p, "ds_id") and not p.ds_persist]
    if partitioned:
        return sum(p.ds_tensor.numel() for p in partitioned) / sum(p.ds_numel for p in partitioned)
    shards = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    mine = sum(shard.to_local().numel() for shard in shards)
    return mine / sum(shard.numel() for shard in shards) if shards else 1.0


def without_compiling() -> None:
    """DeepSpeed would build an operator for processors when its processes meet, which takes minutes; gloo serves."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def work(jobs: list[dict[str, Any]], rank: int, count: int) -> list[dict[str, Any]]:
    told = []
    for job in jobs:
        beside = count // job.get("machines", 1)
        os.environ.update({"LOCAL_WORLD_SIZE": str(beside), "LOCAL_RANK": str(rank % beside)})
        process, step = job.get("kill") or (None, None)
        watch = Watch(job.get("break_at"), step if process == rank else None)
        exit, held = "done", None
        try:
            held = share_held(train(TrainSettings(**job["settings"]), callbacks=[watch]).model)
        except Exception as error:
            exit = f"{type(error).__name__}: {error}"
        told.append({
            "exit": exit, "losses": watch.losses, "evaluated": watch.evaluated, "notices": watch.notices,
            "held": held,
        })  # fmt: skip
    return told


def main() -> None:
    jobs, count, limit = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), int(sys.argv[3])
    import accelerate  # noqa: F401  imported once, before the forks
    import transformers  # noqa: F401

    if any(job["settings"]["profile"] == "zero3" for job in jobs):
        without_compiling()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(count):
            child = os.fork()
            if child == 0:
                faulthandler.dump_traceback_later(limit, exit=True)  # nothing of a broken test waits for ever
                os.environ.update({**common, "RANK": str(rank)})
                (Path(folder) / str(rank)).write_text(json.dumps(work(jobs, rank, count)))
                os._exit(0)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        files = [Path(folder) / str(rank) for rank in range(count)]
        told = [json.loads(file.read_text()) if file.exists() else None for file in files]
    print(json.dumps({"codes": codes, "told": told}))


if __name__ == "__main__":
    main()
