"""Whether candidates may train in one pass: tried on a few rows, both ways, before they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from deltatune.compare.together import Together
from deltatune.data.features import Features
from deltatune.plan.speed import now
from deltatune.train import randomness

TOLERANCE = 1e-4  # of the largest gradient of a parameter, in float32; sums are in another order
HALF_TOLERANCE = 5e-2
NOISE = 0.02  # some factors start at zero, where gradients of the others are zero too and would agree for nothing
DRAWS = 3  # of the noise: a ReLU whose input is zero but for rounding has two gradients, and is elsewhere after another
TIMED = 2  # passes of each kind


def why_not(run: Together, must_gain: bool) -> str | None:
    """Why the pass of all would not do as well as one pass for each; None where it does.

    Args:
        must_gain: It also has to be faster.
    """
    owners = [id(parameter) for member in run.members for parameter in member.parameters]
    if len(set(owners)) < len(owners):
        return "two candidates train the same parameter"
    rows = [run.corpus.train.features[i] for i in run.order.step(run.order.epoch(0), 0)[0]]
    names = [member.name for member in run.members]
    training = run.model.training
    run.model.eval()  # no dropout: its masks differ
    try:
        with randomness.untouched():
            for draw in range(DRAWS):
                with _moved(run, draw):
                    method = _differs(run, rows, names)
                if method is None:
                    break
            else:
                return f"gradients of {method} in one pass are not those of its own pass"
            if must_gain:
                fast = _seconds(lambda: run.loss(rows, names).backward(), run.device)
                slow = sum(_lone_seconds(run, rows, number) for number in range(len(names)))
                if fast > slow:
                    return f"one pass takes {fast / slow:.2f} times as long as one for each"
    finally:
        run.model.train(training)
        run.model.zero_grad(set_to_none=True)
    return None


def _differs(run: Together, rows: list[Features], names: list[str]) -> str | None:
    """The method whose gradients in one pass are not those of its own pass."""
    at_once = _gradients(run, rows, names)
    alone = [_lone(run, rows, number) for number in range(len(names))]
    for member, both, single in zip(run.members, at_once, alone):
        if not _close(both, single, run.shared.dtype == "bfloat16"):
            return member.settings.method
    return None


@contextmanager
def _moved(run: Together, draw: int) -> Iterator[None]:
    """The adapters a little off their start, and back."""
    kept = [[parameter.detach().clone() for parameter in member.parameters] for member in run.members]
    generator = torch.Generator().manual_seed(draw)
    try:
        with torch.no_grad():
            for member in run.members:
                for parameter in member.parameters:
                    noise = torch.randn(parameter.shape, generator=generator) * NOISE
                    parameter.add_(noise.to(parameter))
        yield
    finally:
        with torch.no_grad():
            for member, values in zip(run.members, kept):
                for parameter, value in zip(member.parameters, values):
                    parameter.copy_(value)


def _gradients(run: Together, rows: list[Features], names: list[str]) -> list[list[Tensor | None]]:
    run.model.zero_grad(set_to_none=True)
    run.loss(rows, names).backward()
    return [[None if p.grad is None else p.grad.clone() for p in member.parameters] for member in run.members]


def _lone(run: Together, rows: list[Features], number: int) -> list[Tensor | None]:
    run.model.zero_grad(set_to_none=True)
    with _alone(run, number):
        run.lone_loss(rows).backward()
        return [None if p.grad is None else p.grad.clone() for p in run.members[number].parameters]


def _close(one: list[Tensor | None], other: list[Tensor | None], half: bool) -> bool:
    for a, b in zip(one, other):
        if a is None or b is None:
            if (a is not None and bool(a.any())) or (b is not None and bool(b.any())):
                return False
        elif float((a - b).abs().max()) > (HALF_TOLERANCE if half else TOLERANCE) * max(float(b.abs().max()), 1e-6):
            return False
    return True


def _lone_seconds(run: Together, rows: list[Features], number: int) -> float:
    with _alone(run, number):
        return _seconds(lambda: run.lone_loss(rows).backward(), run.device)


@contextmanager
def _alone(run: Together, number: int) -> Iterator[None]:
    """A candidate as the one active adapter, as in a run of its own."""
    before = run.model.active_adapters
    run.model.set_adapter(run.members[number].name)
    try:
        yield
    finally:
        run.model.set_adapter(before)
        run.all_train()


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(TIMED):
        _wait(device)
        begun = now(device)
        work()
        _wait(device)
        best = min(best, now(device) - begun)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
