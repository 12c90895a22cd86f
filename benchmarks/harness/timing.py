"""Candidates in turns in one process, and what is told of their times: medians, spread, ratios within a round.

What counts is the CPU time of the process: the machines are shared, and a thread that waits costs nobody anything.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
Seconds = dict[str, list[float]]  # of each candidate, one per round


def cpu_seconds(run: Callable[[], Any], calls: int = 1) -> float:
    """CPU seconds of one call, the mean of some, garbage collected before them."""
    gc.collect()
    start = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - start) / calls


def in_turns(
    candidates: Mapping[str, Callable[[], T]],
    rounds: int,
    within: Callable[[str], AbstractContextManager[Any]] = lambda name: contextlib.nullcontext(),
) -> dict[str, list[T]]:
    """What each candidate returns in each round; they take turns, each time in another order.

    Args:
        rounds: How many count; one before them does not.
        within: A context for the call of a candidate, by its name.
    """
    names = list(candidates)
    found: dict[str, list[T]] = {name: [] for name in names}
    for turn in range(-1, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            with within(name):
                value = candidates[name]()
            if turn >= 0:
                found[name].append(value)
    return found


def turns(candidates: Mapping[str, Callable[[], Any]], rounds: int, **options: Any) -> Seconds:
    """CPU seconds of each candidate in each round."""
    return in_turns({name: partial(cpu_seconds, run) for name, run in candidates.items()}, rounds, **options)


def ratio(spent: Seconds, one: str, other: str) -> float:
    """Median of the ratios within a round, which what slows the machine for a while leaves alone."""
    return statistics.median(a / b for a, b in zip(spent[one], spent[other]))


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, the quartiles around it, and the best."""
    low, high = (values[0], values[0]) if len(values) == 1 else statistics.quantiles(values, method="inclusive")[::2]
    return {"median": statistics.median(values), "low": low, "high": high, "best": min(values)}


def beside(spent: Seconds, base: str) -> dict[str, Any]:
    """Of each candidate: its seconds, and its ratios to the base, both summed up."""
    of_base = spent[base]
    return {
        name: {"seconds": summary(values), "ratio": summary([a / b for a, b in zip(values, of_base)])}
        for name, values in spent.items()
    }


# --------------------------------------------------------------------------------------------------- as cells of tables


def milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:,.1f} ms" if value >= 1 else f"{value:.2f} ms"


def with_spread(found: dict[str, float] | None, digits: int = 2) -> str:
    """`median (lower quartile to upper)`; empty where nothing was measured."""
    if found is None:
        return ""
    return f"{found['median']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"
