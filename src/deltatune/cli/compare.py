"""`deltatune compare`: which method suits these rows, and which differences are within noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltatune.cli.arguments import parse
from deltatune.cli.show import console, quiet_libraries, table
from deltatune.cli.train import flags
from deltatune.compare import CompareSettings, Comparison, compare
from deltatune.compare.summary import COLUMNS, JSON, PICTURE, TABLE, cells_of, stopped_cells
from deltatune.errors import ConfigError
from deltatune.train.settings import read_settings

DEFAULT_OUTPUT = "outputs/compare"


def run(words: Sequence[str], as_json: bool) -> None:
    """Settings of the runs and of the comparison come from one file and one command line."""
    given = parse(words, flags())
    values: dict[str, Any] = {} if given.config is None else read_settings(given.config)
    values |= given.settings
    if "methods" in values:
        if "candidates" in values:
            raise ConfigError("methods and candidates are both given; keep one", field="methods")
        values["candidates"] = values.pop("methods")
    own = {name: values.pop(name) for name in CompareSettings.model_fields if name in values}
    values.setdefault("output_dir", DEFAULT_OUTPUT)
    quiet_libraries()
    out = console(stderr=as_json)
    found = compare(values, say=lambda text: out.print(text, soft_wrap=True, markup=False), **own)
    if as_json:
        print((found.output / JSON).read_text(encoding="utf-8"), end="")
    else:
        _show(found)


def _show(found: Comparison) -> None:
    out, summary = console(), found.summary
    columns = ("candidate", summary.metric, *COLUMNS[2:])
    forgets = any(line.forgetting is not None for line in summary.lines)
    shown = len(columns) - (not forgets)
    out.print()
    rows = [cells_of(line)[:shown] for line in summary.lines]
    rows += [stopped_cells(name, stopped)[:shown] for name, stopped in summary.stopped.items()]
    out.print(table(columns[:shown], rows, numbers="lrl" + "r" * 6), soft_wrap=True)
    out.print()
    for text in summary.verdict:
        out.print(text, soft_wrap=True, markup=False)
    for name, why in summary.failed.items():
        out.print(f"{name} failed: {why}", soft_wrap=True, markup=False)
    out.print(f"Files: {', '.join(str(found.output / name) for name in (TABLE, PICTURE, JSON))}", soft_wrap=True)
