"""Local data files as tables, compressed or not, each row with its line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from deltatune.data.parse import File
from deltatune.errors import DataError
from deltatune.suggest import did_you_mean


@dataclass(frozen=True)
class Table:
    """Rows of one source. `lines[i]` is where row i starts in the file; `digest` identifies the content.

    `names` says how a column that was given another name is called in the file.
    """

    source: str
    rows: list[dict[str, Any]]
    lines: list[int]
    digest: str
    numbered: str = "line"  # what `lines` counts: lines of a file, or rows of a list
    names: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        return f"{self.source} {self.numbered} {self.lines[index]}"

    def head(self, count: int | None) -> Table:
        """The first `count` rows (all of them for None), under the digest of the whole and the cut."""
        if count is None or count >= len(self.rows):
            return self
        return self.take(range(count), f"first {count}")

    def take(self, indices: Iterable[int], label: str) -> Table:
        chosen = list(indices)
        digest = hashlib.sha256(f"{self.digest} {label}".encode()).hexdigest()
        rows, lines = [self.rows[i] for i in chosen], [self.lines[i] for i in chosen]
        return Table(self.source, rows, lines, digest, self.numbered, self.names)

    def renamed(self, mapping: Mapping[str, str]) -> Table:
        """The same rows with columns under other names; `mapping` is new name -> name in the file."""
        if not mapping:
            return self
        present = list(dict.fromkeys(name for row in self.rows[:20] for name in row))
        for new, old in mapping.items():
            if old not in present and present:
                raise DataError(
                    f"{self.source}: column_mapping {new}={old}: {old!r} is not a column of the file"
                    f"{did_you_mean(old, present)}; it has {present}",
                    path=self.source,
                    field="column_mapping",
                    found=old,
                    expected=present,
                )
        back = {old: new for new, old in mapping.items()}
        # a column that already had the new name makes room
        rows = [
            {back.get(name, name): value for name, value in row.items() if name in back or name not in mapping}
            for row in self.rows
        ]
        digest = hashlib.sha256(f"{self.digest} {sorted(mapping.items())}".encode()).hexdigest()
        return Table(self.source, rows, self.lines, digest, self.numbered, dict(mapping))


def read_table(path: str | Path, faults: list[DataError] | None = None, limit: int | None = None) -> Table:
    """Read a file; every fault names the file and the line.

    Args:
        faults: Where given, malformed rows are left out and told there, instead of ending the reading.
        limit: Rows after which reading stops.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is a device or a pipe" if path.exists() else "does not exist"
        raise DataError(
            f"data file {path} {what}; give a .jsonl, .json, .csv, .tsv, .txt or .parquet file (also .gz, .xz, .bz2)",
            path=str(path),
            expected="an existing file",
        )
    file = File(path, _raise if faults is None else faults.append)
    parsed = list(islice(file.rows(), limit))
    if not parsed and not faults:
        raise DataError(
            f"{path} is empty; a data file needs at least one row", path=str(path), expected="at least one row"
        )
    return Table(str(path), [row for _, row in parsed], [line for line, _ in parsed], file.hash.hexdigest())


def table_of(rows: Iterable[dict[str, Any]], source: str = "rows") -> Table:
    """A table of rows that are already in memory."""
    kept = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError(
                f"{source} row {number} is a {type(row).__name__}; each row must be a dict with named fields",
                path=source,
                key=str(number),
                found=type(row).__name__,
                expected="dict",
            )
        kept.append(dict(row))
    if not kept:
        raise DataError(
            f"{source} is empty; training data needs at least one row", found=0, expected="at least one row"
        )
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=repr).encode()).hexdigest()
    return Table(source, kept, list(range(1, len(kept) + 1)), digest, "row")


def _raise(error: DataError) -> None:
    raise error
