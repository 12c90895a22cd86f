"""Local data files as tables: jsonl, json, csv, tsv and plain text, compressed or not, each row with its line."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from deltatune.errors import DataError

OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
}


@dataclass(frozen=True)
class Table:
    """Rows of one source. `lines[i]` is where row i starts in the file; `digest` identifies the content."""

    source: str
    rows: list[dict[str, Any]]
    lines: list[int]
    digest: str
    numbered: str = "line"  # what `lines` counts: lines of a file, or rows of a list

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        return f"{self.source} {self.numbered} {self.lines[index]}"

    def head(self, count: int | None) -> "Table":
        """The first `count` rows (all of them for None), under the digest of the whole and the cut."""
        if count is None or count >= len(self.rows):
            return self
        return self.take(range(count), f"first {count}")

    def take(self, indices: Iterable[int], label: str) -> "Table":
        chosen = list(indices)
        digest = hashlib.sha256(f"{self.digest} {label}".encode()).hexdigest()
        rows, lines = [self.rows[i] for i in chosen], [self.lines[i] for i in chosen]
        return Table(self.source, rows, lines, digest, self.numbered)


def read_table(path: str | Path) -> Table:
    """Read a whole file; every fault names the file and the line."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(
            f"data file {path} {what}; give a .jsonl, .json, .csv, .tsv or .txt file (also .gz, .xz, .bz2)",
            path=str(path),
            expected="an existing file",
        )
    text, digest = _text(path)
    parsed = list(_parse(path, text))
    if not parsed:
        raise DataError(
            f"{path} is empty; a data file needs at least one row", path=str(path), expected="at least one row"
        )
    return Table(str(path), [row for _, row in parsed], [line for line, _ in parsed], digest)


def table_of(rows: Iterable[dict[str, Any]], source: str = "rows") -> Table:
    """A table of rows that are already in memory."""
    kept = [dict(row) for row in rows]
    if not kept:
        raise DataError(
            f"{source} is empty; training data needs at least one row", found=0, expected="at least one row"
        )
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=repr).encode()).hexdigest()
    return Table(source, kept, list(range(1, len(kept) + 1)), digest, "row")


def _text(path: Path) -> tuple[str, str]:
    opener = OPENERS.get(path.suffix.lower(), open)
    try:
        stream: IO[Any] = opener(path, "rb")
        with stream:
            content = stream.read()
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read: {error}; check that the file is whole", path=str(path)) from error
    digest = hashlib.sha256(content).hexdigest()
    try:
        return content.decode("utf-8-sig"), digest
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} line {line} is not UTF-8 (byte {content[error.start]:#04x}); save the file as UTF-8",
            path=str(path),
            key=str(line),
            expected="UTF-8 text",
        ) from error


def _parse(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    suffixes = [s.lower() for s in path.suffixes]
    suffix = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in OPENERS else (suffixes[-1] if suffixes else "")
    kind = KINDS.get(suffix)
    if kind is None:
        raise DataError(
            f"{path} has the unknown ending {suffix or '(none)'!r}; use one of {', '.join(KINDS)} (also compressed)",
            path=str(path),
            found=suffix,
            expected=list(KINDS),
        )
    if kind == "jsonl":
        return _jsonl(path, text)
    if kind == "json":
        return _json(path, text)
    if kind == "text":
        return ((n, {"text": line}) for n, line in enumerate(text.splitlines(), 1) if line.strip())
    return _csv(path, text, "\t" if kind == "tsv" else ",")


def _jsonl(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if line.strip():
            yield number, _object(path, number, _loads(path, line, number))


def _json(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    if not text.strip():
        return
    value = _loads(path, text, None)
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise DataError(
            f"{path} holds a JSON {_kind(value)}; expected a list of objects (or one object per line in a .jsonl file)",
            path=str(path),
            found=_kind(value),
            expected="list of objects",
        )
    for number, row in enumerate(value, 1):
        yield number, _object(path, number, row)


def _csv(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) != len(header) or "" in (name.strip() for name in header):
            raise DataError(
                f"{path} line 1: the header {header} has an empty or repeated column name; name every column once",
                path=str(path),
                key=str(1),
                found=header,
            )
        start = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{path} line {start}: {len(cells)} fields where the header names {len(header)} ({header}); "
                    "quote fields that hold the separator",
                    path=str(path),
                    key=str(start),
                    found=len(cells),
                    expected=len(header),
                )
            if cells:
                yield start, dict(zip(header, cells, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path} line {reader.line_num}: malformed CSV ({error})", path=str(path), key=str(reader.line_num)
        ) from error


def _loads(path: Path, text: str, line: int | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        number = error.lineno if line is None else line
        raise DataError(
            f"{path} line {number}: malformed JSON ({error.msg} at column {error.colno}); "
            + ("each line must be one JSON object" if line else "the file must be one JSON list of objects"),
            path=str(path),
            key=str(number),
            found=text.splitlines()[error.lineno - 1][:60] if text.strip() else "",
        ) from error
    except RecursionError as error:
        raise DataError(f"{path} line {line or 1}: JSON is nested too deeply", path=str(path), key=str(line)) from error


def _object(path: Path, number: int, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    place = "line" if path.name.lower().split(".")[-1] not in ("json",) and ".jsonl" in path.name.lower() else "item"
    raise DataError(
        f"{path} {place} {number}: a JSON {_kind(value)}; each row must be an object with named fields",
        path=str(path),
        key=str(number),
        found=_kind(value),
        expected="object",
    )


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
