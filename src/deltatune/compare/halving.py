"""Successive halving: all candidates train a part of their steps, the better half goes on.

https://arxiv.org/abs/1502.07943. All of a round are at the same step of the same schedule of rates, so that none is
judged by a run that was shorter than another's, and the order of the candidates does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from deltatune.compare.leg import Leg

Say = Callable[[str], None]
ROUNDS = (0.25, 0.5)  # shares of a run after which the worse half is stopped
LEAST = 2  # candidates that are left to be compared
TIE = 0.01  # of the loss: one that is so near to the last that goes on goes on too


@dataclass(frozen=True)
class Stopped:
    """A loser: the step at which it was stopped, its loss over the evaluation rows there, and how good it had to be."""

    step: int
    loss: float
    needed: float


@dataclass
class Halved:
    """
    Attributes:
        alive: Those that are to be trained to the end.
        losers: Why and when the others were stopped.
        failed: Those that have no loss, which their results explain.
        last: Where each stood when it was last looked at.
    """

    alive: list[str]
    losers: dict[str, Stopped] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    last: dict[str, Leg] = field(default_factory=dict)


def halve(names: Sequence[str], run: Callable[[str, float], Leg | None], say: Say, least: int = LEAST) -> Halved:
    """Stop the losers.

    Args:
        run: Trains a candidate up to a share of its steps; None where that failed.
        least: Candidates that are left in any case, if no more than the others fail.
    """
    found = Halved(list(names))
    for share in ROUNDS:
        if len(found.alive) <= least:
            break
        for name in list(found.alive):
            leg = run(name, share)
            if leg is None:
                found.alive.remove(name)
                found.failed.append(name)
            else:
                found.last[name] = leg
        keep_best(found, max(least, (len(found.alive) + 1) // 2), say)
    return found


def keep_best(found: Halved, count: int, say: Say) -> None:
    """Stop all but the best `count` of those that are at the same step, and what is as good as the last of them."""
    ranked = sorted(found.alive, key=lambda name: found.last[name].loss)
    if len(ranked) <= count:
        return
    bar = found.last[ranked[count - 1]].loss
    needed = bar + TIE * abs(bar)
    for name in ranked[count:]:
        leg = found.last[name]
        if leg.loss > needed:
            found.losers[name] = Stopped(leg.step, leg.loss, needed)
            found.alive.remove(name)
            say(f"{name}: stopped at step {leg.step}, loss {leg.loss:.4g} where {needed:.4g} was needed to go on")
