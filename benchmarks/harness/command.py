"""The command line of a benchmark: run what is missing, most telling first, and redraw the tables after each cell."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltatune.cli.failures import tell
from deltatune.errors import PeftError
from harness import tables
from harness.cells import Cell, Spec, Store
from harness.data import REPOSITORY
from harness.progress import Line
from harness.studies import Study, pending, select


@dataclass(frozen=True)
class Benchmark:
    """What differs between benchmarks.

    Attributes:
        studies: All studies; with True a small version of them that ends in minutes and means nothing.
        run: Computes the result of a cell; gets a folder for checkpoints and a line for progress.
        render: The Markdown of all that is in the store.
    """

    name: str
    about: str
    studies: Callable[[bool], list[Study]]
    run: Callable[[Spec, Path, Line], dict[str, Any]]
    render: Callable[[Sequence[Study], Store], str]


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 usage, 3 bad input, 5 training failed, 130 or 143 interrupted."""
    asked = _parser(benchmark).parse_args(arguments)
    _settle(asked.threads)
    try:
        return _work(benchmark, asked)
    except PeftError as error:
        return tell(error)


def _work(benchmark: Benchmark, asked: argparse.Namespace) -> int:
    from deltatune.train import TrainingInterrupted

    studies = benchmark.studies(asked.quick)
    chosen = select(studies, asked.only)
    store, results = _places(benchmark, asked)
    if asked.list:
        _print_list(chosen, store)
        return 0
    started, done = time.monotonic(), 0
    while not asked.render and (spec := next(pending(chosen, store), None)) is not None:
        if asked.minutes and time.monotonic() - started > 60 * asked.minutes:
            print(f"{asked.minutes:g} minutes are over; the same command goes on from here", file=sys.stderr)
            break
        finished, all_of_them = sum(study.finished(store) for study in chosen), sum(study.size for study in chosen)
        line = Line(f"[{finished + 1} of {all_of_them}] {spec.name} {_knobs(spec)}")
        try:
            store.put(_cell(benchmark, spec, asked.work / spec.name, line))
        except TrainingInterrupted as stop:
            line.close(f"{stop}")
            print("stopped; the same command goes on from this step", file=sys.stderr)
            return stop.exit_code
        done += 1
        tables.update(results, benchmark.name, benchmark.render(studies, store))
    tables.update(results, benchmark.name, benchmark.render(studies, store))
    missing = sum(study.size - study.finished(store) for study in chosen)
    print(f"{done} cells run, {missing} to go; tables in {results}")
    return 0


def _cell(benchmark: Benchmark, spec: Spec, work: Path, line: Line) -> Cell:
    load, begun = os.getloadavg()[0], time.monotonic()
    line.tell("begins", force=True)
    result = benchmark.run(spec, work, line)
    seconds = time.monotonic() - begun
    line.close(f"done in {seconds / 60:.1f} min")
    conditions = {**_conditions(benchmark), "seconds": round(seconds, 1)}
    return Cell(spec, result, {**conditions, "load": [round(load, 2), round(os.getloadavg()[0], 2)]})


def _conditions(benchmark: Benchmark) -> dict[str, Any]:
    import torch

    from deltatune import __version__
    from deltatune.train.conditions import machine

    return {
        "command": f"python benchmarks/{benchmark.name}.py --threads {torch.get_num_threads()}",
        **machine(),
        "python": platform.python_version(),
        "deltatune": __version__,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _settle(threads: int | None) -> None:
    """Before anything imports transformers or starts threads."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)


def _places(benchmark: Benchmark, asked: argparse.Namespace) -> tuple[Store, Path]:
    """Quick runs never mix with real ones."""
    aside = REPOSITORY / "build" / "benchmarks-quick"
    cells = asked.cells or (aside / "cells" if asked.quick else REPOSITORY / "benchmarks" / "cells")
    results = asked.results or (aside / f"{benchmark.name}.md" if asked.quick else REPOSITORY / "docs" / "results.md")
    return Store(cells), results


def _print_list(studies: Sequence[Study], store: Store) -> None:
    for study in studies:
        chosen = study.chosen(store)
        state = f"{study.finished(store)} of {study.size} cells"
        print(f"{study.label:32} {state:16} {_knobs(chosen.spec) if chosen else ''}")


def _knobs(spec: Spec) -> str:
    return " ".join(f"{name}={spec.hyper[name]:g}" for name in ("learning_rate", "C") if name in spec.hyper)


def _parser(benchmark: Benchmark) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=benchmark.about)
    parser.add_argument("--quick", action="store_true", help="some minutes, to see that it works; kept apart in build/")
    parser.add_argument("--only", help="tasks, methods or task/method, separated by commas")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's own choice)")
    parser.add_argument("--minutes", type=float, default=110, help="begin no cell after this time; 0: no limit")
    parser.add_argument("--list", action="store_true", help="show what is there and what is missing, run nothing")
    parser.add_argument("--render", action="store_true", help="redraw the tables from the cells, run nothing")
    parser.add_argument("--cells", type=Path, help="folder of the cells (default: benchmarks/cells)")
    parser.add_argument("--results", type=Path, help="document with the tables (default: docs/results.md)")
    parser.add_argument(
        "--work", type=Path, default=REPOSITORY / "build" / "benchmarks", help="checkpoints of stopped cells"
    )
    return parser
