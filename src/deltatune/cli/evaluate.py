"""`deltatune eval`: the base and adapters side by side, as one table with intervals."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status

from deltatune.cli.arguments import parse
from deltatune.cli.show import console, facts, quiet_libraries, table
from deltatune.report.words import plural
from deltatune.scoring.bootstrap import Interval
from deltatune.scoring.result import Comparison, Evaluated
from deltatune.storage.files import write_files
from deltatune.train.events import Listener

LONGEST = 300  # characters of a text that is shown


def evaluate(
    adapters: Sequence[str],
    data: Sequence[str],
    columns: Sequence[str],
    lm_eval: str | None,
    output: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    from deltatune.scoring import evaluate_adapters

    named = parse([f"--column={column}" for column in columns]).settings.get("column_mapping", {})
    tasks = [task for task in (lm_eval or "").split(",") if task]
    quiet_libraries()
    with Watch() as watch:
        found = evaluate_adapters(
            adapters,
            (data[0] if len(data) == 1 else list(data)) if data else None,
            columns=named,
            lm_eval=tasks,
            listener=watch,
            **options,
        )
    told = json.dumps(found.as_json(), ensure_ascii=False, indent=2)
    if output is not None:
        path = Path(output)
        write_files(path.parent, {path.name: f"{told}\n".encode()})
    if as_json:
        print(told)
        return
    _show(found, console())
    if output is not None:
        print(f"\nwritten to {output}")


class Watch(Listener):
    """One line on stderr of what is done now, where a person looks at it."""

    def __init__(self) -> None:
        self.out, self.status, self.model, self.stage, self.total = console(stderr=True), None, "", "", 0

    def __enter__(self) -> Watch:
        if sys.stderr.isatty():
            self.status = Status("loading", console=self.out)
            self.status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.status is not None:
            self.status.stop()

    def on_notice(self, text: str) -> None:
        self.model = text

    def on_stage(self, name: str, total: int | None = None) -> None:
        self.stage, self.total = name, total or 0
        self._tell(0)

    def on_stage_progress(self, done: int) -> None:
        self._tell(done)

    def _tell(self, done: int) -> None:
        if self.status is not None:
            of = f" {done} of {self.total}" if self.total else ""
            self.status.update(" ".join(f"{self.model} {self.stage}{of}".split()))


def _show(found: Comparison, out: Console) -> None:
    if found.source is not None:
        rows = plural(found.rows, "row")
        asked = f", {plural(found.inputs, 'different input')} answered" if 0 < found.inputs < found.rows else ""
        out.print(facts([("task", found.task), ("data", f"{found.source}, {rows}{asked}")]))
        out.print()
        out.print(_scores(found))
        out.print(f"intervals: {found.level:.0%} of bootstrap draws; the difference over the same draws", style="dim")
    if found.neutral is not None:
        out.print()
        out.print(_forgetting(found))
    for one in found.models:
        if one.harness:
            out.print()
            out.print(_harness(one))
    for sample in found.samples:
        out.print()
        right = [("right" if i == 0 else "or", text) for i, text in enumerate(sample.references[:2])]
        pairs = [("input", sample.input), *right, *sample.answers.items()]
        out.print(facts((name, _short(text)) for name, text in pairs))
    for note in found.notes:
        out.print(f"\nnote: {note}", style="dim")


def _scores(found: Comparison) -> Any:
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys(name for one in found.models for name in one.scores):
        for place, one in enumerate(found.models):
            value, apart = one.scores[name], one.differences.get(name)
            shown = name.replace("_", " ") if place == 0 else ""
            rows.append((shown, one.name, _number(value.value), _bounds(value), *_difference(apart)))
    against = ("against base", "interval") if any(one.differences for one in found.models) else ("", "")
    return table(("score", "model", "value", "interval", *against), rows, numbers="llrlrl")


def _forgetting(found: Comparison) -> Any:
    rows = [
        (one.name, _number(one.forgetting.value), _bounds(one.forgetting), *_difference(one.forgotten))
        for one in found.models
        if one.forgetting is not None
    ]
    how = "second halves from first halves, " if found.task == "seq2seq" else ""
    title = f"forgetting: loss per token on neutral text ({how}{found.neutral})"
    return table(("model", "loss", "interval", "against base", "interval"), rows, title=title, numbers="lrlrl")


def _harness(one: Evaluated) -> Any:
    rows = [(task, metric, _number(value)) for task, values in one.harness.items() for metric, value in values.items()]
    return table(("task", "metric", "value"), rows, title=f"lm-evaluation-harness: {one.name}", numbers="llr")


def _difference(apart: Interval | None) -> tuple[str, str]:
    return ("", "") if apart is None else (_number(apart.value, signed=True), _bounds(apart, signed=True))


def _bounds(interval: Interval, signed: bool = False) -> str:
    return f"{_number(interval.low, signed)} to {_number(interval.high, signed)}"


def _number(value: float, signed: bool = False) -> str:
    digits = 3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    return f"{value:+,.{digits}f}" if signed else f"{value:,.{digits}f}"


def _short(text: str) -> str:
    flat = " ".join(text.split()) or "(nothing)"
    return flat if len(flat) <= LONGEST else flat[: LONGEST - 3] + "..."
