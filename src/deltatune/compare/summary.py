"""From the numbers of all cells to a table, a verdict in words, and the files that hold them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from string import ascii_lowercase
from typing import Any

import numpy as np

from deltatune.compare.cell import Result
from deltatune.compare.picture import Point, draw
from deltatune.compare.plan import Plan
from deltatune.compare.scores import LOWER_IS_BETTER
from deltatune.compare.select import Stopped, Tried
from deltatune.compare.statistics import Estimate, Findings, judge
from deltatune.report.words import duration, share, size
from deltatune.train.result import as_json

JSON, TABLE, PICTURE = "compare.json", "compare.md", "compare.png"


@dataclass(frozen=True)
class Line:
    """A candidate that was trained under every seed: means over the seeds; memory and time of runs by themselves.

    Attributes:
        groups: Letters; two candidates without a common one differ by more than noise.
        together: Candidates that trained in the same passes, which memory and time are then those of.
    """

    name: str
    score: Estimate
    groups: str
    by_seed: list[float]
    loss: float
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    peak_memory_bytes: int
    train_seconds: float
    forgetting: float | None
    together: int
    learning_rate: float


@dataclass(frozen=True)
class Summary:
    """The table, best first, with what failed beside it."""

    metric: str
    lines: list[Line]
    findings: Findings  # its numbers are places in `lines`
    failed: dict[str, str]  # why, by candidate
    verdict: list[str]
    stopped: dict[str, Stopped] = field(default_factory=dict)  # losers, best first


def summarise(plan: Plan, results: dict[tuple[str, int], Result], tried: Tried | None = None) -> Summary:
    """
    Args:
        tried: Candidates that were stopped on the way, or failed there.
    """
    tried = tried or Tried()
    failed: dict[str, str] = dict(tried.failed)
    whole: list[tuple[str, float, list[Result]]] = []
    for candidate in plan.candidates:
        mine = [results[candidate.name, seed] for seed in plan.seeds if (candidate.name, seed) in results]
        if faults := [result.failed for result in mine if result.failed is not None]:
            failed[candidate.name] = faults[0]
        else:
            whole.append((candidate.name, candidate.settings.resolved_learning_rate, mine))
    for name in _other_rows([(name, mine) for name, _, mine in whole]):
        failed[name] = "it was scored on other rows than the rest, which its limit of tokens left out; raise max_length"
    whole = [one for one in whole if one[0] not in failed]
    sign = 1 if plan.metric in LOWER_IS_BETTER else -1
    whole.sort(key=lambda one: sign * fmean(result.rows.mean for result in one[2] if result.rows is not None))
    findings = _judged([mine for *_, mine in whole])
    lines = [_line(*one, i, findings) for i, one in enumerate(whole)]
    return Summary(plan.metric, lines, findings, failed, _verdict(plan, lines, findings), tried.stopped)


def _other_rows(whole: list[tuple[str, list[Result]]]) -> list[str]:
    """Candidates whose rows count otherwise than those of most."""
    weights = [tuple(r.rows.weights) for _, mine in whole for r in mine[:1] if r.rows is not None]
    usual = max(weights, key=weights.count, default=())
    return [name for (name, _), mine in zip(whole, weights) if mine != usual]


def _judged(whole: list[list[Result]]) -> Findings:
    if not whole:
        return Findings([], [], [], "no candidate was trained to its end")
    rows = [[result.rows for result in mine if result.rows is not None] for mine in whole]
    values = np.array([[one.values for one in mine] for mine in rows], dtype=np.float64)
    return judge(values, np.array(rows[0][0].weights, dtype=np.float64))


def _line(name: str, rate: float, mine: list[Result], place: int, findings: Findings) -> Line:
    forgotten = [result.forgetting for result in mine if result.forgetting is not None]
    decided = findings.undecided is None
    alone = [result for result in mine if result.together == 1] or mine  # which alone say what one needs
    letters = [_letter(i) for i, group in enumerate(findings.groups) if place in group]
    return Line(
        name=name,
        score=findings.scores[place],
        groups="".join(letters) if decided else "?",
        by_seed=[result.rows.mean for result in mine if result.rows is not None],
        loss=fmean(result.loss for result in mine if result.loss is not None),
        trainable_parameters=mine[0].trainable_parameters,
        total_parameters=mine[0].total_parameters,
        adapter_bytes=mine[0].adapter_bytes,
        peak_memory_bytes=alone[0].peak_memory_bytes,
        train_seconds=fmean(result.train_seconds for result in alone),
        forgetting=fmean(forgotten) if forgotten else None,
        together=alone[0].together,
        learning_rate=rate,
    )


def _letter(number: int) -> str:
    return ascii_lowercase[number] if number < 26 else f"({number})"


def _verdict(plan: Plan, lines: list[Line], findings: Findings) -> list[str]:
    """What the numbers say, and what they do not."""
    if findings.undecided is not None or len(lines) < 2:
        return [f"Cannot decide: {findings.undecided or 'one candidate is left'}."]
    same = [line.name for i, line in enumerate(lines) if i and not findings.differ(0, i)]
    worse = [line.name for i, line in enumerate(lines) if findings.differ(0, i)]
    if not worse:
        said = [f"Cannot decide: the differences between {lines[0].name} and the others are within noise."]
    elif not same:
        said = [f"{lines[0].name} is better than all others, by more than noise."]
    else:
        said = [
            f"{lines[0].name} is ahead, but {', '.join(same)} {'is' if len(same) == 1 else 'are'} within noise of it.",
            f"Worse by more than noise: {', '.join(worse)}.",
        ]
    widths = [(p.difference.high or 0) - (p.difference.low or 0) for p in findings.pairs if p.first == 0]
    said.append(
        f"With these rows and {len(plan.seeds)} seeds a difference to the best of about {median(widths) / 2:.2g} in "
        f"{plan.metric} would stand out."
    )
    return said


def stopped_cells(name: str, stopped: Stopped) -> list[str]:
    """A loser as a line of the table, in the order of `COLUMNS`."""
    told = f"stopped at step {stopped.step}: eval loss {stopped.loss:.4g}, needed {stopped.needed:.4g}"
    return [name, told, *["-"] * (len(COLUMNS) - 2)]


COLUMNS = ("candidate", "score", "group", "trains", "share", "adapter", "memory", "time", "forgetting")


def cells_of(line: Line) -> list[str]:
    """A line as words, in the order of `COLUMNS`."""
    score = f"{line.score.mean:.4f}"
    if line.score.low is not None and line.score.high is not None:
        score += f" ± {(line.score.high - line.score.low) / 2:.4f}"
    shared = f" for {line.together}" if line.together > 1 else ""
    return [
        line.name,
        score,
        line.groups,
        f"{line.trainable_parameters:,}",
        share(line.trainable_parameters, line.total_parameters),
        size(line.adapter_bytes),
        size(line.peak_memory_bytes) + shared,
        duration(line.train_seconds) + shared,
        "-" if line.forgetting is None else f"{line.forgetting:+.4f}",
    ]


def write_summary(plan: Plan, summary: Summary, folder: Path) -> None:
    facts: dict[str, Any] = {
        "metric": summary.metric,
        "lower_is_better": summary.metric in LOWER_IS_BETTER,
        "seeds": plan.seeds,
        "undecided": summary.findings.undecided,
        "verdict": summary.verdict,
        "candidates": [asdict(line) for line in summary.lines],
        "pairs": [
            {**asdict(p), "first": summary.lines[p.first].name, "second": summary.lines[p.second].name}
            for p in summary.findings.pairs
        ],
        "groups": [[summary.lines[i].name for i in group] for group in summary.findings.groups if summary.lines],
        "failed": summary.failed,
        "stopped": {name: asdict(one) for name, one in summary.stopped.items()},
        "settings": {one.name: one.settings.resolved() for one in plan.candidates},
    }
    (folder / JSON).write_bytes(as_json(facts))
    (folder / TABLE).write_text(_markdown(summary), encoding="utf-8")
    if summary.lines:
        points = [_point(i, line, summary.findings) for i, line in enumerate(summary.lines)]
        draw(points, summary.metric, summary.metric in LOWER_IS_BETTER, folder / PICTURE)


def _point(place: int, line: Line, findings: Findings) -> Point:
    score, error = line.score, None
    if score.low is not None and score.high is not None:
        error = (score.mean - score.low, score.high - score.mean)
    best = findings.undecided is None and not findings.differ(0, place)
    memory = line.peak_memory_bytes if line.together == 1 else None
    return Point(line.name, score.mean, error, line.trainable_parameters, memory, best)


def _markdown(summary: Summary) -> str:
    head = ["candidate", summary.metric, *COLUMNS[2:]]
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *(cells_of(line) for line in summary.lines)]
    rows += [stopped_cells(name, stopped) for name, stopped in summary.stopped.items()]
    said = [*(f"- {text}" for text in summary.verdict)]
    said += [f"- {name} failed: {why}" for name, why in summary.failed.items()]
    table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
    return f"{table}\n\n" + "\n".join(said) + "\n"
