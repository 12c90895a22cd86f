"""Tables in Markdown, made from cells and put between markers of a document, so that no figure is typed by hand."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltatune.errors import DataError
from deltatune.storage.files import write_files
from harness.cells import Cell, Store
from harness.studies import Study


def spread(values: Sequence[float], digits: int = 3) -> str:
    """`mean ± standard deviation (lowest to highest)`; the value alone when there is one."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are flush right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parameters(result: dict[str, Any]) -> str:
    """How many were trained, and their share where there is a whole to compare with."""
    count = f"{result['trainable_parameters']:,}"
    return (
        f"{count} ({result['trainable_parameters'] / result['all_parameters']:.2%})"
        if "all_parameters" in result
        else count
    )


def chosen_of(study: Study, store: Store) -> str:
    """The value in use and those it was chosen from; says when it lies at the edge or the search is not over."""
    chosen = study.chosen(store)
    if chosen is None:
        return ""
    tried = sorted(cell.spec.hyper[study.knob] for cell in study.tried(store))
    value, missing = chosen.spec.hyper[study.knob], len(study.grid) - len(tried)
    edge = " (edge)" if len(tried) > 1 and value in (tried[0], tried[-1]) else ""
    left = f"; {missing} not tried yet" if missing else ""
    return f"{value:g}{edge} of {', '.join(f'{v:g}' for v in tried)}{left}"


def measured_on(cells: Sequence[Cell]) -> str:
    """The machines and versions behind the figures, and how busy they were: seconds hang on it, scores hardly."""
    if not cells:
        return ""

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(cell.conditions[name]) for cell in cells}))

    loads = [load for cell in cells for load in cell.conditions["load"]]
    return (
        f"Measured on {all_of('machine')}, {all_of('cores')} cores, with {all_of('threads')} threads of torch "
        f"{all_of('torch')}, under a load of {min(loads):.1f} to {max(loads):.1f} (above the number of cores: "
        "shared with other work, and the seconds are longer than they need be)."
    )


def put_between(text: str, name: str, block: str, source: str = "document") -> str:
    """`text` with everything between the markers of `name` replaced by `block`.

    Raises:
        DataError: Not exactly one pair of markers, in order.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise DataError(
            f"{source} needs one line '{begin}' and after it one line '{end}'; the table goes between them",
            path=source,
            key=name,
            found=(text.count(begin), text.count(end)),
        )
    head, rest = text.split(begin)
    tail = rest.split(end)[1]
    return f"{head}{begin}\n{block.strip()}\n{end}{tail}"


def update(path: Path, name: str, block: str) -> None:
    """Rewrite the block `name` of the file; a file that does not exist begins with its markers."""
    old = path.read_text(encoding="utf-8") if path.exists() else f"<!-- begin {name} -->\n<!-- end {name} -->\n"
    new = put_between(old, name, block, path.name)
    if new != old or not path.exists():
        write_files(path.parent, {path.name: new.encode()})
