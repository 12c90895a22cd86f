"""`deltatune train`: settings, a progress bar, results as a table, adapter and report in the output folder."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from deltatune.cli.arguments import parse
from deltatune.cli.launch import COMMAND, Launch, launch
from deltatune.cli.show import console, facts, quiet_libraries, table
from deltatune.errors import ConfigError
from deltatune.registry import METHODS
from deltatune.report.words import duration, share, size
from deltatune.train import TrainResult, TrainSettings, load_settings
from deltatune.train.aliases import CANONICAL, TRANSLATED
from deltatune.train.detect import detected
from deltatune.train.foreign import SWITCHES
from deltatune.train.processes import end_processes, main_process


def train(words: Sequence[str], config: str | None, dry_run: bool, print_config: bool, how: Launch = Launch()) -> None:
    settings = settings_of(words, config)
    if print_config:
        print(yaml.safe_dump(detected(settings).resolved(), sort_keys=False, allow_unicode=True), end="")
        return
    quiet_libraries()
    if dry_run:
        _plan(settings)
        return
    if how.wanted:  # settings are known to be right: every process reads them again
        given = [*words, *(["--config", config] if config else []), *(["--debug"] if "--debug" in sys.argv else [])]
        raise SystemExit(launch(how, ["train", *given]))
    from deltatune.cli.progress import ProgressBar
    from deltatune.generate.load import write_labels
    from deltatune.report.card import write_card
    from deltatune.report.page import write_report
    from deltatune.train import train as run

    if not main_process():  # of several: the first one talks
        run(settings)
        end_processes()
        return
    out = console()
    with ProgressBar(out) as bar:
        result = run(settings, callbacks=[bar])
    end_processes()
    write_labels(result)
    write_card(result)
    report = write_report(result, command=os.environ.get(COMMAND) or shlex.join(["deltatune", *sys.argv[1:]]))
    _results(result, report)


def settings_of(words: Sequence[str], config: str | None) -> TrainSettings:
    """Settings from a file and the command line, which wins."""
    given = parse(words, flags())
    if config is not None and given.config is not None:
        raise ConfigError(
            f"two settings files are named, {config!r} and {given.config!r}; keep one",
            field="config",
            found=[config, given.config],
            expected="one settings file",
        )
    if not words and config is None:
        raise ConfigError(
            "no settings are given; for a start: deltatune train --train_file rows.jsonl (see --help)",
            field="train_file",
            expected="a settings file, or settings",
        )
    return load_settings(config or given.config, given.settings)


def flags() -> set[str]:
    """Names, aliases and options of methods that are true or false."""
    own = {name: field.annotation for name, field in TrainSettings.model_fields.items()}
    for method in METHODS.values():
        own |= {field.name: field.type for field in dataclasses.fields(method.config)}
    found = {name for name, kind in own.items() if kind in (bool, "bool", bool | str | None)}
    return found | {alias for alias, name in CANONICAL.items() if name in found} | set(TRANSLATED) | SWITCHES


def _plan(settings: TrainSettings) -> None:
    """Everything up to the first step: rows read, model loaded and adapted. Nothing is written."""
    from deltatune.counting import parameter_counts
    from deltatune.train.base import load_base
    from deltatune.train.begin import begin
    from deltatune.train.choice import check_choice
    from deltatune.train.corpus import encode_corpus, load_corpus
    from deltatune.train.method import adapt
    from deltatune.train.quantised import check_quantised
    from deltatune.train.settings import UNKNOWN_STEPS

    settings = detected(settings)
    check_quantised(settings)
    corpus = load_corpus(settings)
    check_choice(settings, corpus.eval is not None, corpus.columns.form)
    base = load_base(settings, corpus.labels)
    corpus = encode_corpus(settings, corpus, base.tokenizer, base.vocabulary, base.positions)
    options = settings.options_of(UNKNOWN_STEPS)
    adapted = adapt(base.model, settings.method, settings.task, options, partial(begin, settings, corpus))
    trained, total = parameter_counts(adapted)
    lines: list[tuple[str, Any]] = [
        ("model", f"{settings.model_name_or_path} ({type(base.model).__name__})"),
        ("method", f"{settings.method} {json.dumps(settings.method_options)}"),
        ("trainable", f"{trained:,} of {total:,} parameters ({share(trained, total)})"),
        ("columns", f"{', '.join(corpus.columns.inputs)} -> {corpus.columns.target or 'the text itself'}"),
    ]
    for name, part in (("train", corpus.train), ("evaluation", corpus.eval), ("test", corpus.test)):
        if part is not None and part.lengths is not None:
            cut = f", {part.lengths.truncated} cut" if part.lengths.truncated else ""
            lengths = f"inputs up to {part.lengths.longest_input} tokens, answers up to {part.lengths.longest_target}"
            lines.append((name, f"{part.lengths.rows:,} rows, {lengths}{cut}"))
    lines.append(("output", f"{settings.output_dir} (nothing was written)"))
    console().print(facts(lines))


def _results(result: TrainResult, report: Path) -> None:
    from deltatune.report.page import kept

    out, metrics = console(), result.metrics
    rows = [(name, _number(before), _number(after)) for name, before, after in score_rows(metrics)]
    if rows:
        out.print()
        out.print(table(("score", "before", "after"), rows, numbers="lrr"))
    for sample in result.samples[:2]:
        out.print()
        pairs = [("input", sample.input), ("before", sample.before), ("after", sample.after)]
        out.print(facts((name, _short(text)) for name, text in pairs if text is not None))
    out.print()
    out.print(
        facts(
            [
                *kept(metrics, result.settings.load_best_model_at_end),
                (
                    "time",
                    f"{duration(metrics['train_seconds'])}, up to {size(metrics['peak_memory_bytes'])} of memory",
                ),
                ("adapter" if result.settings.method != "full" else "model", str(result.output_dir)),
                ("report", str(report)),
                ("use it", f"deltatune generate {shlex.quote(str(result.output_dir))} --compare 'your input'"),
            ]
        )
    )


def score_rows(metrics: dict[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """(name, before, after) of every score that there is."""
    rows = []
    for part in ("eval", "test"):
        before, after = metrics["before"].get(part, {}), metrics["after"].get(part, {})
        rows += [(f"{part} {name}", before.get(name), after.get(name)) for name in {**before, **after}]
    return rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _short(text: str, limit: int = 300) -> str:
    flat = " ".join(text.split()) or "(nothing)"
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."
