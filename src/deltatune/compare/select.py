"""Which candidates are trained to the end: all, what halving leaves of them, or what a search has found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from deltatune.compare import cell, cells
from deltatune.compare.halving import Halved, Stopped, halve
from deltatune.compare.leg import Leg, clear
from deltatune.compare.plan import Candidate, Plan
from deltatune.data.prepare import Corpus
from deltatune.errors import TrainError


@dataclass
class Tried:
    """Candidates that are not in the comparison: those that were stopped, best first, and those that failed."""

    stopped: dict[str, Stopped] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def select(
    plan: Plan, corpus: Corpus, forget: Corpus | None, isolate: bool, say: Callable[[str], None]
) -> tuple[Plan, Tried]:
    """The plan of those that are left.

    Legs are runs under the first seed; those of the winners are the first parts of their cells and not trained again.

    Raises:
        TrainError: None is left.
    """
    if not plan.own.search and not plan.own.stop_losers:
        return plan, Tried()
    first = replace(plan, seeds=plan.seeds[:1])
    specs: dict[str, cell.Spec] = {}

    def leg(candidate: Candidate, share: float) -> Leg | None:
        if candidate.name not in specs:
            specs.update(
                {name: spec for (name, _), spec in cells.specs(_only(first, candidate), corpus, forget).items()}
            )
        return cells.leg(specs[candidate.name], share, isolate)

    if plan.own.search:
        from deltatune.compare.search import search

        candidates, found = search(plan, leg, say)
    else:
        by_name = {candidate.name: candidate for candidate in plan.candidates}
        found = halve(list(by_name), lambda name, share: leg(by_name[name], share), say)
        candidates = [candidate for candidate in plan.candidates if candidate.name in found.alive]
    tried = _tried(found, specs)
    if not candidates:
        raise TrainError(
            "no candidate is left: " + "; ".join(f"{name}: {why}" for name, why in tried.failed.items()),
            field="candidates",
            found=dict(tried.failed),
            expected="a candidate that trains",
        )
    return replace(plan, candidates=candidates), tried


def _only(plan: Plan, candidate: Candidate) -> Plan:
    return replace(plan, candidates=[candidate])


def _tried(found: Halved, specs: dict[str, cell.Spec]) -> Tried:
    """What is told of those that are out; nothing goes on from their checkpoints."""
    failed = {}
    for name in [*found.failed, *found.losers]:
        folder = Path(specs[name].settings["output_dir"])
        clear(folder)
        if name in found.failed:
            result = cell.read(folder, specs[name].key)
            failed[name] = (result.failed if result is not None else None) or f"it left no result in {folder}"
    # those that came further first
    losers = sorted(found.losers.items(), key=lambda one: (-one[1].step, one[1].loss))
    return Tried(dict(losers), failed)
