"""`deltatune generate`: answers to inputs from the command line, a file or stdin."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deltatune.cli.show import console, facts, quiet_libraries
from deltatune.data.read import Table, read_table
from deltatune.errors import ConfigError, DataError
from deltatune.generate.decoding import Decoding
from deltatune.storage.files import write_files

COLUMNS = ("input", "prompt", "instruction", "source", "mr", "question", "text", "sentence", "document", "content")


def generate(
    adapters: Sequence[str],
    prompts: list[str],
    model: str | None,
    separator: str | None,
    file: str | None,
    column: str | None,
    output: str | None,
    compare: bool,
    decoding: Decoding,
    as_json: bool,
) -> None:
    inputs = _inputs(prompts, file, column)
    quiet_libraries()
    rows = (_of_several if len(adapters) > 1 else _of_one)(adapters, inputs, model, separator, compare, decoding)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if output is not None:
        path = Path(output)
        write_files(path.parent, {path.name: lines.encode()})
    elif as_json:
        print(lines, end="")
    else:
        _show(rows)


def _of_one(
    adapters: Sequence[str],
    inputs: list[str],
    model: str | None,
    separator: str | None,
    compare: bool,
    decoding: Decoding,
) -> list[dict[str, Any]]:
    from deltatune.generate import answers, load_ready

    ready = load_ready(adapters[0], model, separator, compare)
    found = answers(ready, inputs, decoding)
    base = answers(ready, inputs, decoding, base=True) if compare else [None] * len(inputs)
    rows: list[dict[str, Any]] = []
    for text, answer, before in zip(inputs, found, base):
        row: dict[str, Any] = {"input": text, "output": answer.text}
        if answer.probability is not None:
            row["probability"] = round(answer.probability, 4)
        if before is not None:
            row["base"] = before.text
        rows.append(row)
    return rows


def _of_several(
    adapters: Sequence[str],
    inputs: list[str],
    model: str | None,
    separator: str | None,
    compare: bool,
    decoding: Decoding,
) -> list[dict[str, Any]]:
    """`outputs` by the adapters' names, `probabilities` beside them; the base's among them where it is asked for."""
    from deltatune.generate import BASE, answers, load_several, plan_several

    several = load_several(plan_several(adapters, model, separator))
    rows: list[dict[str, Any]] = [{"input": text, "outputs": {}} for text in inputs]
    for name in [*([BASE] if compare else []), *several.adapters]:
        with several.using(name) as ready:
            found = answers(ready, inputs, decoding)
        for row, answer in zip(rows, found):
            row["outputs"][name] = answer.text
            if answer.probability is not None:
                row.setdefault("probabilities", {})[name] = round(answer.probability, 4)
    return rows


def _inputs(prompts: list[str], file: str | None, column: str | None) -> list[str]:
    if prompts and file is not None:
        raise ConfigError("inputs are given both as arguments and with --file; keep one", field="file", found=file)
    if prompts:
        return prompts
    if file is not None:
        return list(rows_of(file, column))
    lines = [line.rstrip("\n") for line in sys.stdin]
    found = [line for line in lines if line.strip()]
    if not found:
        raise DataError(
            "no input: give it as an argument, with --file, or on stdin, one a line",
            field="inputs",
            found=[],
            expected="text, one input a line",
        )
    return found


def rows_of(file: str, column: str | None) -> Iterator[str]:
    table = read_table(file)
    present: Sequence[str] = list(table.rows[0])
    name = column or next((known for known in COLUMNS if known in present), "")
    names = [part for part in name.split(",") if part]
    if not names:
        raise DataError(
            f"{file}: none of its columns {list(present)} is known as an input; name it with --column",
            path=file,
            field="column",
        )
    for index in range(len(table.rows)):
        yield "\n".join(_text(table, index, part) for part in names)


def _text(table: Table, index: int, name: str) -> str:
    value = table.rows[index].get(name)
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        value = " ".join(value)  # words, as taggers are trained on
    if not isinstance(value, str) or not value.strip():
        fault = "is not text" if value else "is missing or empty"
        raise DataError(
            f"{table.where(index)}: field {name!r} {fault}; expected text",
            path=table.source,
            field=name,
            found=value,
        )
    return value


def _show(rows: list[dict[str, Any]]) -> None:
    """Answers alone, one a line, for pipes; with their inputs where a person reads, or there are several."""
    if not sys.stdout.isatty() and not any("base" in row or "outputs" in row for row in rows):
        for row in rows:
            print(" ".join(row["output"].split()))
        return
    out = console()
    for row in rows:
        out.print(facts([("input", row["input"]), *_answers(row)]))
        out.print()


def _answers(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(who, what) of a row."""
    if "outputs" in row:
        sure = row.get("probabilities", {})
        return [(name, text + _percent(sure.get(name))) for name, text in row["outputs"].items()]
    base = [("base", row["base"])] if "base" in row else []
    return [*base, ("answer", row["output"] + _percent(row.get("probability")))]


def _percent(probability: float | None) -> str:
    return "" if probability is None else f"  ({probability:.1%})"
