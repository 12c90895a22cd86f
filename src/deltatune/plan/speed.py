"""How fast a device is, and how long a cost takes on it: arithmetic, memory, and a fixed time for every operation."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import ConfigError
from deltatune.suggest import did_you_mean

USUAL = 0.4  # of what a data sheet says is what training reaches
SMALL, MIDDLE = 3 * 2**20, 96 * 2**20  # bytes moved by tensors of 1 MiB, and of 32: larger ones get new pages each time
RING = 64 * 2**20  # bytes: beyond the caches of one core
LAUNCH = 8e-6  # seconds for an operation from Python on an accelerator's host


@dataclass
class Cost:
    """Operations by dtype: for each its FLOP, its bytes, and the random numbers that it draws."""

    operations: dict[torch.dtype, list[tuple[float, int, int]]] = field(default_factory=dict)

    def add(self, flop: float, moved: int, drawn: int, dtype: torch.dtype) -> None:
        self.operations.setdefault(dtype, []).append((flop, moved, drawn))

    @property
    def flop(self) -> float:
        return sum(flop for listed in self.operations.values() for flop, _, _ in listed)

    @property
    def count(self) -> int:
        return sum(map(len, self.operations.values()))


@dataclass(frozen=True)
class Speed:
    """
    Attributes:
        flops: FLOP per second, in float32 and in bfloat16.
        bandwidth: Bytes per second of operations that move up to `SMALL`, up to `MIDDLE`, and more.
        overhead: Seconds for each operation; they run beside the arithmetic where the device has a queue.
        queued: Whether it has. Then arithmetic and traffic overlap; a core of a CPU does one after the other.
        draw: Seconds for a random number, of which dropout takes one for each entry.
    """

    name: str
    flops: tuple[float, float]
    bandwidth: tuple[float, float, float]
    overhead: float
    queued: bool = False
    memory: int | None = None
    draw: float = 0.0

    def seconds(self, cost: Cost) -> float:
        busy = 0.0
        for dtype, listed in cost.operations.items():
            rate = self.flops[1 if dtype in (torch.bfloat16, torch.float16) else 0]
            for flop, moved, drawn in listed:
                arithmetic, traffic = flop / rate, self._moving(moved)
                busy += max(arithmetic, traffic) if self.queued else arithmetic + traffic + drawn * self.draw
        waiting = cost.count * self.overhead
        return max(busy, waiting) if self.queued else busy + waiting

    def _moving(self, moved: int) -> float:
        small, middle, large = self.bandwidth
        return moved / (small if moved <= SMALL else middle if moved <= MIDDLE else large)


# data sheets: dense TF32 and bfloat16 FLOP/s, bytes/s, bytes
_SHEETS = {
    "rtx3090": (35e12, 71e12, 936e9, 24),
    "rtx4090": (82e12, 165e12, 1008e9, 24),
    "l4": (60e12, 121e12, 300e9, 24),
    "l40s": (183e12, 362e12, 864e9, 48),
    "a10": (62e12, 125e12, 600e9, 24),
    "a100-40": (156e12, 312e12, 1555e9, 40),
    "a100-80": (156e12, 312e12, 2039e9, 80),
    "h100": (494e12, 989e12, 3350e9, 80),
    "h200": (494e12, 989e12, 4800e9, 141),
    "b200": (1100e12, 2250e12, 8000e9, 180),
}


def named(name: str) -> Speed:
    """A device by its data sheet."""
    key = name.lower().replace("nvidia", "").strip(" -_")
    if key not in _SHEETS:
        raise ConfigError(
            f"device {name!r} is not known{did_you_mean(key, list(_SHEETS))}; there are {', '.join(_SHEETS)}; "
            "give --device-memory for any other",
            field="device",
            found=name,
            expected=list(_SHEETS),
        )
    single, half, bandwidth, memory = _SHEETS[key]
    steady = 0.7 * bandwidth
    return Speed(key, (single * USUAL, half * USUAL), (steady, steady, steady), LAUNCH, True, memory * 10**9)


@cache
def here(device: str = "cpu") -> Speed:
    """This machine, measured in about a second with the threads that torch has now."""
    import psutil

    place = torch.device(device)
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(512, 512, device=place).to(dtype)
        rates.append(2 * 512**3 / _seconds(lambda a=a: a @ a, place))
    small, middle, large = (_bandwidth(entries, place) for entries in (2**17, 2**20, 2**23 + 2**21))
    bandwidth = (small, middle, large)
    if place.type == "cuda":
        memory = torch.cuda.get_device_properties(place).total_memory
        return Speed(torch.cuda.get_device_name(place), (rates[0], rates[1]), bandwidth, LAUNCH, True, memory)
    drawn = torch.empty(2**18)
    draw = _seconds(lambda: drawn.bernoulli_(0.1), place) / drawn.numel()
    speed = Speed("this machine", (rates[0], rates[1]), bandwidth, 0.0, False, psutil.virtual_memory().total, draw)
    return replace(speed, overhead=_overhead(speed))


def now(device: torch.device) -> float:
    """Seconds, to take differences of. With one thread on a CPU those of this process alone, which are not longer where
    other programs run beside it."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def _bandwidth(entries: int, device: torch.device) -> float:
    """Of sums whose terms are in no cache and whose results stay, as those of a forward pass do."""
    rounds = max(2, RING // (4 * entries))
    terms = [torch.randn(entries, device=device) for _ in range(rounds)]
    kept: deque[Tensor] = deque(maxlen=rounds)
    turn = itertools.cycle(range(rounds))

    def add() -> None:
        at = next(turn)
        kept.append(terms[at] + terms[at - 1])

    for _ in range(rounds):
        add()
    return 3 * 4 * entries / _seconds(add, device)


def _seconds(run: Callable[[], Any], device: torch.device, least: float = 0.1) -> float:
    """Of one run: the median of those that there is time for."""
    run()
    took, start = [], now(device)
    while now(device) - start < least:
        begun = now(device)
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(now(device) - begun)
    return statistics.median(took)


def _overhead(speed: Speed) -> float:
    """Seconds per operation of a network so small that nothing else counts."""
    from deltatune.plan.live import LiveBytes

    layers = [module for _ in range(8) for module in (nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())]
    network, x, cost = nn.Sequential(*layers), torch.randn(2, 8), Cost()

    def step() -> None:
        network(x).sum().backward()

    with LiveBytes(cost.add):
        step()
    return max(0.0, _seconds(step, x.device) - speed.seconds(cost)) / cost.count
