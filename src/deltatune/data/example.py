"""A checked row of a table, and the fault of one that is not as it should be."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from deltatune.suggest import did_you_mean

_SURROGATE = re.compile("[\ud800-\udfff]")

# tasks whose answer is text that the model writes; the others have a head on top of the model
TEXT_TASKS = ("seq2seq", "causal", "chat")
# those of a model that goes on writing where its input ends
CAUSAL_TASKS = ("causal", "chat")


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are what.

    `form` is 'pairs', 'labelled', 'text', 'tagged', 'passages', 'messages' (whole conversations) or 'turns'
    (conversations of one exchange, as pairs have it).
    """

    form: str
    inputs: tuple[str, ...]
    target: str | None = None
    label_names: str | None = None
    task_id: str | None = None
    system: str | None = None
    tools: str | None = None
    history: str | None = None


@dataclass(frozen=True)
class Example:
    """One checked row: `text` in, `target` out (None for plain text), `line` and `source` to name it by.

    `task_id` is for prompts that several tasks share.
    """

    text: str
    target: str | None
    line: int
    task_id: int | None = field(default=None, kw_only=True)
    source: str = field(default="", kw_only=True, compare=False)


class Fault(Exception):
    """What is wrong with a field of a row; told with the row's place by whoever reads the table."""

    def __init__(self, field: str, problem: str, expected: str) -> None:
        self.field, self.problem, self.expected = field, problem, expected


def string(row: dict[str, Any], name: str, blank: bool = False, missing: bool = False) -> str:
    """The text in a field; `blank` and `missing` say what is allowed."""
    if name not in row:
        if missing:
            return ""
        raise Fault(name, absent(name, row), "text")
    value = row[name]
    if value is None and missing:
        return ""
    if not isinstance(value, str):
        raise Fault(name, f"is {kind(value)}", "text")
    if not value.strip() and not blank:
        raise Fault(name, "is empty", "text")
    if not value.isascii() and _SURROGATE.search(value):  # JSON can escape one alone; tokenizers take text
        raise Fault(name, f"is {short(value)}, with half of a character of two (a lone surrogate)", "Unicode text")
    return value


def absent(name: str, present: Iterable[str]) -> str:
    """That a field is not there, with the nearest that is."""
    names = sorted(map(str, present))
    return f"is missing (the row has {names}{did_you_mean(name, names)})"


def name_of_class(value: Any) -> str | None:
    """A class as it is written in the data, a name or a whole number; None for anything else."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, str | int) or (isinstance(value, float) and value.is_integer()):
        return value if isinstance(value, str) else str(int(value))
    return None


def kind(value: Any) -> str:
    """A value as an error names it."""
    return "null" if value is None else f"{short(value)} of type {type(value).__name__}"


def short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
