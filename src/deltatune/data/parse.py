"""The rows of one file, as they are read: jsonl, csv and text line by line, json and parquet whole."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
from collections.abc import Callable, Iterator
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
    ".parquet": "parquet",
}
Numbered = Iterator[tuple[int, dict[str, Any]]]  # the line a row starts at, and the row


def kind_of(path: Path) -> str | None:
    """The kind of a file by its ending, under that of a compression; None for one we do not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in OPENERS:
        suffixes.pop()
    return KINDS.get(suffixes[-1] if suffixes else "")


class File:
    """A file being read: its lines, and the hash of what has been read of it.

    `fault` gets an error that concerns one row only; it raises it, or keeps it and lets reading go on.
    """

    def __init__(self, path: Path, fault: Callable[[DataError], None]) -> None:
        self.path, self.fault = path, fault
        self.hash = hashlib.sha256()

    def rows(self) -> Numbered:
        kind = kind_of(self.path)
        if kind is None:
            suffix = "".join(self.path.suffixes[-1:])
            raise DataError(
                f"{self.path} has the unknown ending {suffix or '(none)'!r}; use one of {', '.join(KINDS)} "
                "(also compressed)",
                path=str(self.path),
                found=suffix,
                expected=list(KINDS),
            )
        if kind == "jsonl":
            return self._jsonl()
        if kind == "json":
            return self._json()
        if kind == "text":
            return ((n, {"text": line.rstrip("\r\n")}) for n, line in self.lines() if line.strip())
        if kind == "parquet":
            return self._parquet()
        return self._csv("\t" if kind == "tsv" else ",")

    def lines(self) -> Iterator[tuple[int, str]]:
        """Only a line feed ends a line: JSON strings may hold U+2028."""
        opener = OPENERS.get(self.path.suffix.lower(), open)
        number = 0
        try:
            stream: IO[Any] = opener(self.path, "rb")
            with stream:
                for number, line in enumerate(stream, 1):
                    self.hash.update(line)
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise DataError(
                f"{self.path} line {number} is not UTF-8 (byte {byte:#04x}); save the file as UTF-8",
                path=str(self.path),
                key=str(number),
                expected="UTF-8 text",
            ) from error
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise self._unreadable(error) from error

    def _jsonl(self) -> Numbered:
        for number, line in self.lines():
            if not line.strip():
                continue
            try:
                row = _object(self.path, number, _loads(self.path, line.rstrip("\r\n"), number), "line")
            except DataError as error:
                self.fault(error)
            else:
                yield number, row

    def _json(self) -> Numbered:
        text = "".join(line for _, line in self.lines())
        if not text.strip():
            return
        value = _loads(self.path, text, None)
        if isinstance(value, dict) and isinstance(value.get("data"), list):
            value = value["data"]
        if not isinstance(value, list):
            raise DataError(
                f"{self.path} holds a JSON {_kind(value)}; expected a list of objects (or one object per line in a "
                ".jsonl file)",
                path=str(self.path),
                found=_kind(value),
                expected="list of objects",
            )
        for number, row in enumerate(_flattened(value), 1):
            try:
                yield number, _object(self.path, number, row, "item")
            except DataError as error:
                self.fault(error)

    def _csv(self, delimiter: str) -> Numbered:
        # lines that end with a carriage return alone are lines too
        lines = (part for _, line in self.lines() for part in io.StringIO(line, newline=""))
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            if len(set(header)) != len(header) or "" in (name.strip() for name in header):
                raise DataError(
                    f"{self.path} line 1: the header {header} has an empty or repeated column name; name every column "
                    "once",
                    path=str(self.path),
                    key=str(1),
                    found=header,
                )
            start = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    self.fault(_cells(self.path, start, cells, header))
                elif cells:
                    yield start, dict(zip(header, cells, strict=True))
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{self.path} line {reader.line_num}: malformed CSV ({error})",
                path=str(self.path),
                key=str(reader.line_num),
            ) from error

    def _parquet(self) -> Numbered:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise DataError(
                f"{self.path}: parquet files need the package pyarrow; pip install 'deltatune[data]'",
                path=str(self.path),
                field="pyarrow",
            ) from error
        try:
            with open(self.path, "rb") as stream:
                for piece in iter(lambda: stream.read(1 << 20), b""):
                    self.hash.update(piece)
            file = parquet.ParquetFile(self.path)
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except (OSError, pyarrow.ArrowException) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DataError:
        reason = " ".join(str(error).split())
        return DataError(f"{self.path} cannot be read: {reason}; check that the file is whole", path=str(self.path))


def _flattened(rows: list[Any]) -> Iterator[Any]:
    """SQuAD's own files hold articles of paragraphs of questions: one row for each question."""
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("paragraphs"), list):
            yield row
            continue
        for paragraph in row["paragraphs"]:
            for question in paragraph.get("qas", ()) if isinstance(paragraph, dict) else ():
                shared = {"title": row.get("title"), "context": paragraph.get("context")}
                yield {**shared, **question} if isinstance(question, dict) else question


def _cells(path: Path, start: int, cells: list[str], header: list[str]) -> DataError:
    return DataError(
        f"{path} line {start}: {len(cells)} fields where the header names {len(header)} ({header}); "
        "quote fields that hold the separator",
        path=str(path),
        key=str(start),
        found=len(cells),
        expected=len(header),
    )


def _loads(path: Path, text: str, line: int | None) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        number = error.lineno if line is None else line
        raise DataError(
            f"{path} line {number}: malformed JSON ({error.msg} at column {error.colno}); "
            + ("each line must be one JSON object" if line else "the file must be one JSON list of objects"),
            path=str(path),
            key=str(number),
            found=text.splitlines()[error.lineno - 1][:60] if text.strip() else "",
        ) from error
    except ValueError as error:  # a key that stands twice, a number of thousands of digits
        reason = str(error).partition(";")[0]
        raise DataError(
            f"{path} line {line or 1}: {reason}", path=str(path), key=str(line or 1), found=text[:60], expected="JSON"
        ) from error
    except RecursionError as error:
        raise DataError(f"{path} line {line or 1}: JSON is nested too deeply", path=str(path), key=str(line)) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """One of two values would be taken, and the other never seen."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return values


def _object(path: Path, number: int, value: Any, place: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
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
