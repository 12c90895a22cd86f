"""From the columns of a table to checked examples: pairs, plain text, text with a label, tagged words, passages."""

from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from deltatune.data.example import Columns, Example, Fault, kind, name_of_class, short, string
from deltatune.data.passages import passage
from deltatune.data.read import Table
from deltatune.data.tagging import TAGS, WORDS, tagged
from deltatune.errors import DataError

# (input columns, target column), in the order in which they are looked for
PAIRS = (
    (("input",), "target"),
    (("prompt",), "completion"),
    (("instruction", "input"), "output"),
    (("instruction",), "output"),
    (("source",), "target"),
    (("mr",), "ref"),
    (("question",), "answer"),
    (("prompt",), "response"),
    (("input",), "output"),
    (("document",), "summary"),
    (("article",), "highlights"),
)
TEXTS = ("text", "sentence", "content", "review", "question", "input")
ANSWERS = ("answers", "answer")
LABELS = ("label", "labels", "class", "category", "intent", "target")


def detect(
    table: Table,
    task: str,
    input_column: str | None = None,
    target_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
) -> Columns:
    """Which columns the task reads: the ones that were named, else the first known pattern the file has."""
    present = _present(table)
    for field, name in {
        "input_column": input_column,
        "target_column": target_column,
        "text_column": text_column,
        "label_column": label_column,
    }.items():
        if name is not None and name not in present:
            raise DataError(
                f"{table.source}: {field} {name!r} is not a column of the file{_nearest(name, present)}; "
                f"it has {present}",
                path=table.source,
                field=field,
                found=name,
                expected=present,
            )
    if task == "classification":
        text = text_column or input_column or _first(TEXTS, present)
        label = label_column or target_column or _first(LABELS, [c for c in present if c != text])
        if text and label:
            names = "label_name" if "label_name" in present and label == "label" else None
            return Columns("labelled", (text,), label, names)
        raise _unknown(table, present, "a text and a label (text/label)", "text_column and label_column")
    if task == "token_classification":
        words = text_column or input_column or _first(WORDS, present)
        tags = label_column or target_column or _first(TAGS, [c for c in present if c != words])
        if words and tags:
            return Columns("tagged", (words,), tags)
        raise _unknown(table, present, "words and their tags (tokens/tags)", "text_column and label_column")
    if task == "question_answering":
        question, context = input_column or "question", text_column or "context"
        answers = target_column or _first(ANSWERS, present)
        if question in present and context in present and answers:
            return Columns("passages", (question, context), answers)
        wanted = "a question, its context and answers (question, context, answers)"
        raise _unknown(table, present, wanted, "input_column, text_column and target_column")
    if (text_column or (not (input_column or target_column) and present == ["text"])) and task == "causal":
        return Columns("text", (text_column or "text",))
    if input_column or target_column:
        given = next((p for p in PAIRS if p[0] == (input_column,) or p[1] == target_column), ((None,), None))
        source, target = input_column or given[0][-1], target_column or given[1]
        if source in present and target in present and source is not None:
            return Columns("pairs", (source,), target)
        raise _unknown(table, present, "an input and a target", "both input_column and target_column")
    for sources, target in PAIRS:
        if target in present and all(source in present for source in sources):
            return Columns("pairs", sources, target)
    if task == "causal" and "text" in present:
        return Columns("text", ("text",))
    known = ", ".join("+".join(sources) + "/" + target for sources, target in PAIRS)
    raise _unknown(table, present, f"one of {known}", "input_column and target_column")


def examples(table: Table, columns: Columns) -> list[Example]:
    """Every row checked before anything is trained: the first fault is shown, with how many rows share it."""
    made: list[Example] = []
    faults: list[tuple[str, int, str, str]] = []
    for index, row in enumerate(table.rows):
        try:
            example = _example(table, index, row, columns)
            made.append(
                example if columns.task_id is None else replace(example, task_id=_task_id(row, columns.task_id))
            )
        except Fault as fault:
            faults.append((fault.field, index, fault.problem, fault.expected))
    if not faults:
        return made
    field, index, problem, expected = faults[0]
    same = [i for f, i, p, _ in faults if f == field]
    more = f" ({len(same) - 1} more rows like it)" if len(same) > 1 else ""
    raise DataError(
        f"{table.where(index)}: field {field!r} {problem}{more}; expected {expected}",
        path=table.source,
        key=str(table.lines[index]),
        field=field,
        found=table.rows[index].get(field),
        expected=expected,
    )


def _example(table: Table, index: int, row: dict[str, Any], columns: Columns) -> Example:
    line = table.lines[index]
    if columns.form == "tagged":
        return tagged(row, columns, line)
    if columns.form == "passages":
        return passage(row, columns, line)
    if columns.form == "labelled":
        assert columns.target is not None
        label = _label(row, columns.target)
        return Example(string(row, columns.inputs[0]), label, line)
    if columns.form == "text":
        return Example(string(row, columns.inputs[0]), None, line)
    assert columns.target is not None
    first, *rest = columns.inputs
    parts = [string(row, first), *(string(row, name, blank=True, missing=True) for name in rest)]
    return Example("\n".join(part for part in parts if part.strip()), string(row, columns.target), line)


def _task_id(row: dict[str, Any], name: str) -> int:
    value = row.get(name)
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)  # as csv has it
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise Fault(name, f"is {kind(value)}", "the number of a task, 0 or above")
    return value


def _label(row: dict[str, Any], name: str) -> str:
    expected = "a label (a whole number or a name)"
    if name not in row or row[name] is None or row[name] == "":
        raise Fault(name, "is missing: the row is not labelled", expected)
    label = name_of_class(row[name])
    if label is None:
        raise Fault(name, f"is {short(row[name])} of type {type(row[name]).__name__}", expected)
    return label


def _present(table: Table) -> list[str]:
    # all columns that any of the first rows has, so that one bad first row is told as a bad row, not as a bad file
    seen: dict[str, None] = {}
    for row in table.rows[:20]:
        seen.update(dict.fromkeys(str(name) for name in row))
    return list(seen)


def _first(names: tuple[str, ...], present: list[str]) -> str | None:
    return next((name for name in names if name in present), None)


def _nearest(name: str, present: list[str]) -> str:
    close = get_close_matches(name, present, 1, 0.6)
    return f" (nearest: {close[0]!r})" if close else ""


def _unknown(table: Table, present: list[str], wanted: str, setting: str) -> DataError:
    return DataError(
        f"{table.source}: columns {present} are no known format; expected {wanted}, or name them with {setting}",
        path=table.source,
        field="columns",
        found=present,
        expected=wanted,
        hint=f"set {setting}",
    )
