"""`compare`: candidates x seeds, scored on the same held-out rows; a table, a picture, and what is within noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltatune.compare import cell, cells
from deltatune.compare.cell import Result, forget_settings, held_out
from deltatune.compare.plan import CompareSettings, Plan, make_plan
from deltatune.compare.select import select
from deltatune.compare.statistics import why_undecided
from deltatune.compare.summary import Summary, summarise, write_summary
from deltatune.compare.together import shared_settings, why_alone
from deltatune.data.prepare import Corpus
from deltatune.train.corpus import load_corpus
from deltatune.train.lock import output_lock

Say = Callable[[str], None]
Specs = dict[tuple[str, int], cell.Spec]


@dataclass(frozen=True)
class Comparison:
    """What a comparison found; the same is in `compare.json`, `compare.md` and `compare.png`."""

    plan: Plan  # its candidates are those that were trained to the end
    results: dict[tuple[str, int], Result]  # by candidate and seed
    summary: Summary
    output: Path


def compare(
    settings: dict[str, Any],
    candidates: Sequence[str | dict[str, Any]] | str = (),
    *,
    isolate: bool = True,
    say: Say = lambda text: None,
    **own: Any,
) -> Comparison:
    """Train every candidate under every seed, and judge which is better.

    What a cell found is kept in its folder below `output_dir`: a comparison that was broken off goes on where it was,
    and one with further candidates or seeds runs only these.

    Args:
        settings: What all runs share, by the names of `TrainSettings`.
        candidates: Methods, or settings of one candidate each (`{"method": "lora", "r": 16, "learning_rate": 1e-3}`).
        isolate: Each cell in a process of its own, so that the memory it is said to need is its own.
        say: Told what goes on, a line at a time.
        own: The fields of `CompareSettings`.

    Raises:
        PeftError: Settings or rows are wrong; nothing was trained. A candidate that fails is told in the table.
    """
    given = own if not candidates else {"candidates": candidates, **own}
    plan = make_plan(CompareSettings(**given), settings)
    for notice in plan.notices:
        say(notice)
    with output_lock(plan.output):
        corpus, forget = _rows(plan)
        part = held_out(corpus)
        say(
            f"{len(plan.candidates)} candidates, {len(plan.seeds)} seed{'s' if len(plan.seeds) > 1 else ''}; "
            f"{plan.metric} over {len(part.examples):,} held-out rows of {part.source}"
        )
        if (reason := why_undecided(len(plan.seeds), len(part.examples))) is not None:
            say(f"cannot decide: {reason}")
        plan, tried = select(plan, corpus, forget, isolate, say)
        results = _run(plan, cells.specs(plan, corpus, forget), isolate, say)
        summary = summarise(plan, results, tried)
        write_summary(plan, summary, plan.output)
    return Comparison(plan, results, summary, plan.output)


def _rows(plan: Plan) -> tuple[Corpus, Corpus | None]:
    """All rows, read and checked before any model is loaded."""
    file = plan.own.forget_file
    return load_corpus(plan.shared), None if file is None else load_corpus(forget_settings(plan.shared, file))


def _run(plan: Plan, specs: Specs, isolate: bool, say: Say) -> dict[tuple[str, int], Result]:
    """Every cell's result: kept from earlier, found in one pass with others, or alone."""
    kept = {place: result for place, spec in specs.items() if (result := cells.done(spec)) is not None}
    results = kept | _together(plan, {place: spec for place, spec in specs.items() if place not in kept}, isolate, say)
    for number, candidate in enumerate(plan.candidates, 1):
        places = [(candidate.name, seed) for seed in plan.seeds]
        left = [place for place in places if place not in results]
        found = cells.run([specs[place] for place in left], isolate) if left else []
        results |= dict(zip(left, found))
        before = sum(place in kept for place in places)
        said = ", ".join(_told(results[place]) for place in places)
        say(f"[{number}/{len(plan.candidates)}] {candidate.name}: {said}" + (f" ({before} kept)" if before else ""))
    return results


def _together(plan: Plan, left: Specs, isolate: bool, say: Say) -> dict[tuple[str, int], Result]:
    """What can be trained in one pass.

    `auto` leaves the first seed to runs of their own, by which memory and time of each candidate are measured, and
    takes one pass for the others where that is faster.
    """
    if plan.own.one_pass == "never":
        return {}
    must_gain, results = plan.own.one_pass == "auto", {}
    seeds = plan.seeds[1:] if must_gain else plan.seeds
    for names in _groups(plan, say if plan.own.one_pass == "always" else lambda text: None):
        for seed in seeds:
            mine = {(name, seed): left[name, seed] for name in names if (name, seed) in left}
            if len(mine) < 2:
                continue
            reason = cells.run_together(list(mine.values()), isolate, must_gain)
            if reason is not None:
                say(f"{', '.join(names)}: each by itself, because {reason}")
                break
            say(f"seed {seed}: {', '.join(name for name, _ in mine)} in one pass")
            results |= {place: cells.read(spec, Path(spec.settings["output_dir"])) for place, spec in mine.items()}
    return results


def _groups(plan: Plan, say: Say) -> list[list[str]]:
    """Candidates that may share a pass; those that may not are told."""
    found: dict[str, list[str]] = {}
    for candidate in plan.candidates:
        reason = why_alone(candidate.settings)
        if reason is None:
            found.setdefault(shared_settings(candidate.settings), []).append(candidate.name)
        else:
            say(f"{candidate.name}: by itself, because {reason}")
    return list(found.values())


def _told(result: Result) -> str:
    return f"{result.rows.mean:.4g}" if result.rows is not None else f"failed: {result.failed}"
