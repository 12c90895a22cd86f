"""The processes of a run: torchrun or accelerate start them, the loop decides with them as one.

What one process alone finds out (a signal, a fault in writing, the loss of its rows) is shared before anything hangs on
it: a process that goes another way than the others leaves them waiting.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from deltatune.errors import ConfigError, MismatchError, TrainError
from deltatune.train.defaults import FULL
from deltatune.train.settings import TrainSettings
from deltatune.train.zero import check_installed

T = TypeVar("T")
SHARDING = ("fsdp2", "zero3")  # profiles under which a process has a part of the base
# what torch's backends say when another process is gone; gloo raises plain RuntimeErrors
_LOST = (
    "Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "Socket Timeout",
    "Timed out waiting", "gloo/transport",
)  # fmt: skip


def launched() -> int:
    """How many processes torchrun or accelerate started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def main_process() -> bool:
    """Known from the environment, before any process has met another."""
    return int(os.environ.get("RANK", "0")) == 0


def on_cpu(device: str) -> bool:
    """Whether a run with this setting is on the CPU, which accelerate has to be told for its processes to meet."""
    return device == "cpu" or (device == "auto" and not torch.accelerator.is_available())


def profile_of(settings: TrainSettings) -> str:
    """`profile` with "auto" resolved.

    Raises:
        ConfigError: It does not go with the number of processes.
    """
    count = launched()
    name = settings.profile
    if settings.device_map is not None and (count > 1 or settings.method == FULL):
        raise ConfigError(
            f"device_map={settings.device_map!r} spreads a frozen base over the devices of one process, expected an "
            f"adapter and one process, not method {settings.method} in {count}; use profile: fsdp2 for several",
            field="device_map",
            found=count,
            expected=1,
        )
    for switch, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(switch, "false").lower() == "true":
            raise ConfigError(
                f"accelerate's configuration asks for {what}; take it out (accelerate launch --multi_gpu), and say "
                "profile: fsdp2 or profile: zero3 for a base in shards",
                field="profile",
                found=what,
                expected="fsdp2",
            )
    if name == "auto":
        return "single" if count == 1 else "ddp"
    if name == "single" and count > 1:
        raise ConfigError(
            f"profile='single' is not allowed in {count} processes, expected ddp",
            field="profile",
            found=name,
            expected="ddp",
        )
    if name != "single" and "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            f"profile={name!r} needs processes: deltatune train --launcher torchrun --nproc_per_node 2 ...",
            field="profile",
            found=name,
        )
    if name in SHARDING and settings.method == FULL:
        raise ConfigError(
            f"profile={name!r} shards a frozen base, and method: full trains it; use profile: ddp, or an adapter",
            field="profile",
            found=name,
            expected="ddp",
        )
    if name in SHARDING and count == 1:
        return "single"  # there is nobody to share with
    if name == "zero3":
        check_installed()
    return name


def meet(device: str) -> Any:
    """Accelerate's object for this process, once all have met: on `device` ("auto", "cpu", ...), in no half precision.

    Accelerate keeps one state for the whole interpreter. Where a Trainer or the user's own `Accelerator` has made it,
    it is shared and left as it is, its mixed precision apart: that is the setting `dtype` here.

    Raises:
        ConfigError: `device` and the processes, or the state that is there, do not go together.
    """
    from accelerate import Accelerator
    from accelerate.state import is_initialized
    from accelerate.utils import DistributedDataParallelKwargs

    shared = is_initialized()
    made = Accelerator(
        cpu=on_cpu(device) and not shared,
        mixed_precision=None if shared else "no",
        kwargs_handlers=[DistributedDataParallelKwargs()],
    )
    made.native_amp, made.scaler = False, None
    if on_cpu(device) != (made.device.type == "cpu"):
        raise ConfigError(
            f"device={device!r}, and accelerate has been started on {made.device} in this process; start a new "
            "process, or let both use the same device",
            field="device",
            found=str(made.device),
            expected=device,
        )
    if made.num_processes != launched():
        raise ConfigError(
            f"{launched()} processes were started and accelerate sees {made.num_processes} on {made.device}; set "
            "device: cpu, or start as many as there are accelerators",
            field="device",
            found=made.num_processes,
            expected=launched(),
        )
    return made


def sums(accelerator: Any, *values: float) -> list[float]:
    """Each number summed over all processes."""
    if accelerator.num_processes == 1:
        return list(values)
    kind = torch.float32 if accelerator.device.type == "mps" else torch.float64
    tensor = torch.tensor(values, dtype=kind, device=accelerator.device)
    return accelerator.reduce(tensor, "sum").tolist()


def largest(accelerator: Any, value: int) -> int:
    """The largest number that any process has."""
    if accelerator.num_processes == 1:
        return value
    tensor = torch.tensor([value], device=accelerator.device)
    return int(accelerator.gather(tensor).max())


def gathered(accelerator: Any, value: T) -> list[T]:
    """The values of all processes, in their order."""
    if accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def by_first(accelerator: Any, work: Callable[[], T]) -> T:
    """Done by the first process; all return its result, or raise what it raised."""
    if accelerator.num_processes == 1:
        return work()
    from accelerate.utils import broadcast_object_list

    told: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            told[0] = work()
        except Exception as error:
            told[1] = error
    broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


def check_equal(accelerator: Any, facts: dict[str, Any]) -> None:
    """Refuse to train when processes have read other settings, rows or weights than the first one.

    Raises:
        MismatchError: In every process, naming what differs and where.
    """
    first, *others = gathered(accelerator, facts)
    for number, theirs in enumerate(others, 1):
        # machines may have other numbers of cores
        unlike = sorted(name for name in first if first[name] != theirs.get(name) and name != "num_threads")
        if unlike:
            raise MismatchError(
                f"process {number} has other {', '.join(unlike)} than process 0; every machine needs the same "
                "settings, data and base model",
                field=unlike[0],
                found=theirs.get(unlike[0]),
                expected=first[unlike[0]],
            )


def lost(error: BaseException) -> TrainError | None:
    """What to tell if an exception means that another process is gone."""
    if not isinstance(error, torch.distributed.DistError) and not any(sign in str(error) for sign in _LOST):
        return None
    return TrainError(
        "another process of this run has ended, or cannot be reached; see what it wrote, then go on with "
        "resume_from_checkpoint: true",
        field="processes",
        found=str(error).splitlines()[0] if str(error) else type(error).__name__,
    )


def end_processes() -> None:
    """Let go of the other processes: nothing of this one needs them any more."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
