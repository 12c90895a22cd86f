"""From the columns of a table to checked examples, of the form that the task reads."""

from dataclasses import replace
from typing import Any

from deltatune.data.conversation import HISTORY, MESSAGES, SYSTEM, TOOLS, conversation
from deltatune.data.example import Columns, Example, Fault, kind, name_of_class, short, string
from deltatune.data.passages import passage
from deltatune.data.read import Table
from deltatune.data.tagging import TAGS, WORDS, tagged
from deltatune.errors import DataError
from deltatune.suggest import did_you_mean, nearest

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
    (("instruction",), "response"),
    (("query",), "response"),
    (("question",), "response"),
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
    if task == "chat":
        return _chat(table, present, input_column, target_column)
    if (text_column or (not (input_column or target_column) and present == ["text"])) and task == "causal":
        return Columns("text", (text_column or "text",))
    found = _pairs(table, present, input_column, target_column)
    if found is not None:
        return Columns("pairs", *found)
    if task == "causal" and "text" in present:
        return Columns("text", ("text",))
    chat = next((name for name in MESSAGES if name in present), None)
    if chat is not None:
        raise DataError(
            f"{table.source}: column {chat!r} holds conversations, which task {task} does not read; use task: chat",
            path=table.source,
            field="task",
            found=task,
            expected="chat",
        )
    known = ", ".join("+".join(sources) + "/" + target for sources, target in PAIRS)
    raise _unknown(table, present, f"one of {known}", "input_column and target_column")


def _pairs(
    table: Table, present: list[str], input_column: str | None, target_column: str | None
) -> tuple[tuple[str, ...], str] | None:
    """The columns of inputs and of the target: named ones, else the first known pattern; None where there is none."""
    if input_column or target_column:
        given = next((p for p in PAIRS if p[0] == (input_column,) or p[1] == target_column), ((None,), None))
        source, target = input_column or given[0][-1], target_column or given[1]
        if source in present and target in present and source is not None:
            return (source,), target
        raise _unknown(table, present, "an input and a target", "both input_column and target_column")
    return next((pair for pair in PAIRS if pair[1] in present and all(name in present for name in pair[0])), None)


def _chat(table: Table, present: list[str], input_column: str | None, target_column: str | None) -> Columns:
    def beside(name: str) -> str | None:
        return name if name in present else None

    listed = next((name for name in MESSAGES if name in present), None)
    if input_column and not target_column:
        listed = input_column
    if listed is not None and not target_column:
        return Columns("messages", (listed,), system=beside(SYSTEM), tools=beside(TOOLS))
    found = _pairs(table, present, input_column, target_column)
    if found is not None:
        return Columns("turns", *found, system=beside(SYSTEM), tools=beside(TOOLS), history=beside(HISTORY))
    known = ", ".join([*MESSAGES[:2], *("+".join(sources) + "/" + target for sources, target in PAIRS[:5])])
    near = next((hint for name in present if (hint := did_you_mean(name, MESSAGES))), "")
    raise _unknown(table, present, f"one of {known}, ...{near}", "column_mapping, or input_column and target_column")


def examples(table: Table, columns: Columns, faults: list[DataError] | None = None) -> list[Example]:
    """Every row checked before anything is trained: the first fault is shown, with how many rows share it.

    With `faults`, faulty rows are left out and all told there.
    """
    made: list[Example] = []
    found: list[tuple[int, Fault]] = []
    for index, row in enumerate(table.rows):
        try:
            task_id = None if columns.task_id is None else _task_id(row, columns.task_id)
            made.append(replace(_example(table, index, row, columns), task_id=task_id, source=table.source))
        except Fault as fault:
            found.append((index, fault))
    if faults is not None:
        faults += [_told(table, index, fault) for index, fault in found]
    elif found:
        index, fault = found[0]
        same = sum(other.field == fault.field for _, other in found) - 1
        raise _told(table, index, fault, f" ({same} more rows like it)" if same else "")
    return made


def _told(table: Table, index: int, fault: Fault, more: str = "") -> DataError:
    column, dot, rest = _column(fault.field)
    name = table.names.get(column, column) + dot + rest  # as the file calls it
    return DataError(
        f"{table.where(index)}: field {name!r} {fault.problem}{more}; expected {fault.expected}",
        path=table.source,
        key=str(table.lines[index]),
        field=name,
        found=table.rows[index].get(column),
        expected=fault.expected,
    )


def _column(field: str) -> tuple[str, str, str]:
    """A field within a column, such as `messages[2].role`."""
    return field.partition("[")


def _example(table: Table, index: int, row: dict[str, Any], columns: Columns) -> Example:
    line = table.lines[index]
    if columns.form == "tagged":
        return tagged(row, columns, line)
    if columns.form == "passages":
        return passage(row, columns, line)
    if columns.form in ("messages", "turns"):
        return conversation(row, columns, line)
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
    if isinstance(value, str) and value.strip().isdecimal():
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
    close = nearest(name, present)
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
