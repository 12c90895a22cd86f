"""`deltatune data check`: what would be trained on, as a table, a histogram, marked text, and faults by line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import typer
from rich.console import Console
from rich.text import Text

from deltatune.cli.arguments import parse
from deltatune.cli.failures import FILE
from deltatune.cli.show import console, facts, quiet_libraries, table
from deltatune.cli.train import flags
from deltatune.data.checking import PartReport, Report
from deltatune.data.checking.report import Sample
from deltatune.data.checking.spread import Spread
from deltatune.data.example import CAUSAL_TASKS
from deltatune.errors import ConfigError
from deltatune.report.words import plural, share
from deltatune.train.settings import TrainSettings, load_settings

BAR = 40  # columns of the longest bar
SHOWN = 10  # faults and labels
LONGEST = 1200  # characters of a sample that are shown
LEARNT, NOT_LEARNT = "+ ", "  "  # where there are no colours


def check(words: Sequence[str], config: str | None, samples: int, as_json: bool) -> None:
    settings = _settings(words, config)
    quiet_libraries()
    from deltatune.data import check as run

    report = run(settings=settings, samples=samples)
    if as_json:
        print(json.dumps(report.as_json(), ensure_ascii=False, indent=2))
    else:
        _show(report, console())
    if report.faults:
        raise typer.Exit(FILE)


def _settings(words: Sequence[str], config: str | None) -> TrainSettings:
    given = parse(words, flags(), files=True)
    if given.files and "train_file" in given.settings:
        raise ConfigError("data files are given both alone and with --train_file; keep one", field="train_file")
    if given.files:
        given.settings["train_file"] = given.files if len(given.files) > 1 else given.files[0]
    if not words and config is None:
        raise ConfigError(
            "no data is given; for a start: deltatune data check rows.jsonl --model FOLDER",
            field="train_file",
            expected="a data file",
        )
    return load_settings(config, given.settings)


def _show(report: Report, out: Console) -> None:
    columns = ", ".join(report.columns["inputs"])
    read = f"{columns} -> {report.columns.get('target', columns)}"
    out.print(facts([("task", report.task), ("columns", read), ("max_length", report.max_length)]))
    out.print()
    out.print(_counts(report.parts))
    train = report.parts[0]
    if train.tokens.bins:
        out.print()
        out.print(_histogram(train, report.max_length))
    if train.labels:
        out.print()
        most = sorted(train.labels.items(), key=lambda item: -item[1])
        title = "labels of train" if len(most) <= SHOWN else f"labels of train ({SHOWN} of {len(most)})"
        out.print(table((title, "count"), most[:SHOWN], numbers="lr"))
    for part in report.parts:
        for sample in part.samples:
            out.print()
            _sample(part, sample, out)
    _findings(report, out)


def _counts(parts: Sequence[PartReport]) -> object:
    names = ["", *(part.name for part in parts)]
    rows = [
        ("rows", [f"{part.rows:,}" for part in parts]),
        ("used", [f"{part.used:,}" for part in parts]),
        ("cut", [f"{part.cut - part.left_out:,}" for part in parts]),
        ("left out", [f"{part.left_out:,}" for part in parts]),
        ("tokens (p50, p90, p99, most)", [_spread(part.tokens) for part in parts]),
        ("learnt (p50, p90, p99, most)", [_spread(part.learnt) for part in parts]),
        ("learnt in all", [f"{part.learnt.total:,}" for part in parts]),
        ("duplicates, nearly", [f"{part.duplicates:,}, {part.near_duplicates:,}" for part in parts]),
    ]
    packs = [f"{part.packs[0]:,} ({part.packs[1]:.0%} full)" if part.packs else "" for part in parts]
    rows += [("packs", packs)] if any(packs) else []
    return table(names, [(name, *cells) for name, cells in rows], numbers="l" + "r" * len(parts))


def _spread(found: Spread) -> str:
    return f"{found.p50}, {found.p90}, {found.p99}, {found.most}"


def _histogram(part: PartReport, limit: int) -> object:
    bins = part.tokens.bins
    most = max(count for *_, count in bins)
    rows = []
    for start, end, count in bins:
        bar = "█" * round(BAR * count / most) or ("▏" if count else "")
        rows.append((f"{start:,}-{end:,}", bar + (" > max_length" if start > limit and count else ""), f"{count:,}"))
    return table(("tokens", "", "rows"), rows, numbers="rlr")


def _sample(part: PartReport, sample: Sample, out: Console) -> None:
    cut = ", cut" if sample.cut else ""
    line = f"line {sample.line}" if sample.line else ""
    head = f"{part.name} {line}: {plural(sample.tokens, 'token')}{cut}"
    out.print(Text(head, style="bold"))
    left = LONGEST
    pieces = []
    for text, learnt in sample.pieces:
        pieces.append((text if len(text) <= left else text[: max(left, 0)] + " ...", learnt))
        left -= len(text)
        if left <= 0:
            break
    if out.is_terminal:
        marked = (Text(_visible(text), style="bold green" if learnt else "dim") for text, learnt in pieces)
        out.print(Text.assemble(*marked), soft_wrap=False)
    else:
        for mark, line in _lines(pieces):
            for row in Text(line).wrap(out, out.width - len(mark)) or [Text("")]:
                out.print(Text(mark) + row, soft_wrap=True)


def _lines(pieces: Sequence[tuple[str, bool]]) -> Iterator[tuple[str, str]]:
    """Each run of text on lines of its own, marked as in a patch."""
    for text, learnt in pieces:
        for line in text.split("\n"):
            if line.strip():
                yield (LEARNT if learnt else NOT_LEARNT), line


def _visible(text: str) -> str:
    return text.replace("\n", "⏎\n")


def _findings(report: Report, out: Console) -> None:
    out.print()
    for warning in report.warnings:
        out.print(Text.assemble(("warning", "yellow"), f": {warning}"), soft_wrap=True)
    for fault in report.faults[:SHOWN]:
        out.print(Text.assemble(("fault", "red"), f": {fault.message}"), soft_wrap=True)
    if len(report.faults) > SHOWN:
        out.print(f"and {plural(len(report.faults) - SHOWN, 'fault')} more (all of them: --json)")
    train = report.parts[0]
    learnt = f"{plural(train.learnt.total, 'prediction')} to learn from"
    if report.task in CAUSAL_TASKS and train.tokens.total:
        learnt += f", {share(train.learnt.total, train.tokens.total)} of the tokens"
    verdict = f"{plural(len(report.faults), 'faulty row')}" if report.faults else "no faulty row"
    out.print(f"{verdict}; {learnt}")
