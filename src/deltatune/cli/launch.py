"""`deltatune train --launcher torchrun|accelerate`: one command in several processes, and one exit code of them."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from deltatune.cli.failures import TRAINING, say
from deltatune.errors import ConfigError

LAUNCHERS = ("torchrun", "accelerate")
COMMAND = "DELTATUNE_COMMAND"  # the command as it was given, for the report


@dataclass(frozen=True)
class Launch:
    """How many processes, and where; names are torchrun's."""

    launcher: str | None = None
    nproc_per_node: int | None = None
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None

    @property
    def wanted(self) -> bool:
        return self.launcher is not None or self.nproc_per_node is not None or self.nnodes > 1

    def check(self) -> None:
        if self.launcher not in (None, *LAUNCHERS):
            raise ConfigError(
                f"launcher={self.launcher!r} is not known; there are {', '.join(LAUNCHERS)}",
                field="launcher",
                found=self.launcher,
                expected=LAUNCHERS,
            )
        if self.nnodes > 1 and self.master_addr is None:
            raise ConfigError(
                f"nnodes={self.nnodes} needs master_addr, the address of the first machine, the same on all",
                field="master_addr",
            )
        if not 0 <= self.node_rank < self.nnodes:
            raise ConfigError(
                f"node_rank={self.node_rank} is not allowed, expected 0 to {self.nnodes - 1}", field="node_rank"
            )
        if "LOCAL_RANK" in os.environ:
            raise ConfigError(
                "a launcher has started this process already; leave launcher and nproc_per_node out", field="launcher"
            )


def launch(how: Launch, words: Sequence[str]) -> int:
    """Run `deltatune` with these words in every process; the exit code."""
    how.check()
    os.environ[COMMAND] = shlex.join(["deltatune", *sys.argv[1:]])
    count = how.nproc_per_node or _devices()
    # a launcher would give each process one thread, and warn
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    if how.launcher == "accelerate":
        return _accelerate(how, count, words)
    return _torchrun(how, count, words)


def _devices() -> int:
    import torch

    return max(torch.accelerator.device_count() if torch.accelerator.is_available() else 1, 1)


def _torchrun(how: Launch, count: int, words: Sequence[str]) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    options = [*_place(how), "--nproc-per-node", str(count), "--max-restarts", "0"]
    try:
        run(get_args_parser().parse_args([*options, "-m", "deltatune.cli", *words]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _code(rank, failure.exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _place(how: Launch) -> list[str]:
    """Where processes meet; without any of it torchrun takes a free port of this machine."""
    if how.nnodes == 1 and how.master_addr is None and how.master_port is None:
        return []
    place = ["--nnodes", str(how.nnodes), "--node-rank", str(how.node_rank)]
    place += ["--master-addr", how.master_addr or "127.0.0.1"]
    return place if how.master_port is None else [*place, "--master-port", str(how.master_port)]


def _code(rank: int, code: int) -> int:
    """The exit code for what the first process that failed ended with; it has said why, unless it was killed."""
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    say(f"process {rank} was ended by {name}, and the others with it; go on with resume_from_checkpoint: true")
    return TRAINING


def _accelerate(how: Launch, count: int, words: Sequence[str]) -> int:
    options = ["--num_processes", str(count * how.nnodes), "--num_machines", str(how.nnodes)]
    options += ["--machine_rank", str(how.node_rank)]
    if how.master_addr is not None:
        options += ["--main_process_ip", how.master_addr]
    if how.master_port is not None:
        options += ["--main_process_port", str(how.master_port)]
    if count * how.nnodes > 1:
        options.append("--multi_gpu")
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "deltatune.cli", *words]
    return subprocess.call(command)
