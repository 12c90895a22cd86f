"""Which settings make a job fit: fewer rows, checkpointing, half precision, a base in 4 bits, shorter rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from deltatune.data.example import TEXT_TASKS
from deltatune.plan.job import Job, Shape, build_job
from deltatune.plan.speed import Speed
from deltatune.plan.step import Memory, simulate
from deltatune.train.settings import TrainSettings

BITS4 = 0.5 + 4 / 64  # bytes of an entry in NF4: a code, and a scale in float32 for 64 of them


@dataclass(frozen=True)
class Choice:
    """Settings that were tried.

    Attributes:
        changes: What is other than was asked for.
        peak: Bytes on the device, with what the device itself takes.
        seconds: Of one step over as many rows as were asked for.
    """

    changes: dict[str, Any]
    peak: int
    seconds: float
    fits: bool


def reserved(device: torch.device, baseline: int = 0) -> int:
    """Bytes that are taken beside tensors: a context and libraries on CUDA, the process itself on a CPU."""
    return 600 * 2**20 if device.type == "cuda" else baseline


def choices(settings: TrainSettings, device: torch.device, room: int, speed: Speed, beside: int) -> list[Choice]:
    """What fits, best first (fewest changes, then the fastest); then the smallest of what does not."""
    found = list(_tried(settings, device, room, speed, beside))
    if not any(choice.fits for choice in found):
        length = settings.max_length // 2
        while length >= 64 and not any(choice.fits for choice in found):
            shorter = _with(settings, {"max_length": length, "per_device_train_batch_size": 1})
            changed = {"max_length": length, "gradient_checkpointing": True, **_half(settings, device)}
            found.append(_choice(settings, _with(shorter, changed), {**changed}, device, room, speed, beside, 1))
            length //= 2
    good = sorted((c for c in found if c.fits), key=lambda c: (len(c.changes), c.seconds))
    return good + sorted((c for c in found if not c.fits), key=lambda c: c.peak)[:3]


def _tried(settings: TrainSettings, device: torch.device, room: int, speed: Speed, beside: int) -> Iterator[Choice]:
    checkpointing = [{}] if settings.gradient_checkpointing else [{}, {"gradient_checkpointing": True}]
    half = [{}, _half(settings, device)] if _half(settings, device) else [{}]
    loss = {"loss": "chunked"} if settings.loss == "model" and settings.task in TEXT_TASKS else {}
    for more, precision in product(checkpointing, half):
        changes = {**more, **precision, **(loss if more or precision else {})}
        yield from _rows(settings, changes, device, room, speed, beside)


def _rows(
    settings: TrainSettings, changes: dict[str, Any], device: torch.device, room: int, speed: Speed, beside: int
) -> Iterator[Choice]:
    """The most rows at once, halves of what was asked for, that fit; and the same on a base in 4 bits."""
    asked = settings.per_device_train_batch_size
    job = build_job(_with(settings, changes), device)
    quantised = [False, True] if job.sizes.linear and settings.method != "full" else [False]
    tried: dict[int, Any] = {}
    for in_bits in quantised:
        rows = asked
        while True:
            if rows not in tried:
                tried[rows] = simulate(job, replace(Shape.of(settings), rows=rows))
            choice = _made(settings, job, tried[rows], changes, rows, in_bits, room, speed, beside)
            if choice.fits or rows == 1:
                yield choice
                break
            rows = max(1, rows // 2)


def _choice(
    asked: TrainSettings,
    changed: TrainSettings,
    changes: Any,
    device: Any,
    room: int,
    speed: Speed,
    beside: int,
    rows: int,
) -> Choice:
    job = build_job(changed, device)
    return _made(
        asked, job, simulate(job, replace(Shape.of(changed), rows=rows)), changes, rows, False, room, speed, beside
    )


def _made(
    settings: TrainSettings,
    job: Job,
    found: Any,
    changes: Any,
    rows: int,
    in_bits: bool,
    room: int,
    speed: Speed,
    beside: int,
) -> Choice:
    told = dict(changes)
    asked = settings.per_device_train_batch_size
    parts = math.ceil(asked / rows)
    if parts > 1:
        told["per_device_train_batch_size"] = rows
        told["gradient_accumulation_steps"] = settings.gradient_accumulation_steps * parts
    memory: Memory = found.memory
    peak = memory.peak + beside
    if in_bits:
        told["base"] = "4 bits"
        peak -= saved_by_4_bits(job)
    seconds = speed.seconds(found.micro) * parts * settings.gradient_accumulation_steps + speed.seconds(found.update)
    return Choice(told, peak, seconds, peak <= room)


def saved_by_4_bits(job: Job) -> int:
    """Bytes that frozen linear layers in NF4 save; the largest is whole again while it is used."""
    weight = next(p for p in job.model.parameters() if not p.requires_grad)
    return int(job.sizes.linear * (weight.element_size() - BITS4)) - job.sizes.largest * 2


def _half(settings: TrainSettings, device: torch.device) -> dict[str, Any]:
    already = settings.dtype == "bfloat16" or (settings.dtype == "auto" and device.type == "cuda")
    return {} if already else {"dtype": "bfloat16"}


def _with(settings: TrainSettings, changes: dict[str, Any]) -> TrainSettings:
    return settings.model_copy(update={k: v for k, v in changes.items() if k != "base"})
