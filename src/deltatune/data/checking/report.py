"""The findings of a check, as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from deltatune.data.checking.spread import Spread


@dataclass(frozen=True)
class RowFault:
    """A row that training would refuse."""

    path: str | None
    line: str | None
    field: str | None
    message: str


@dataclass(frozen=True)
class Sample:
    """A row as the model gets it: pieces of text, and of each whether it is learnt."""

    source: str
    line: int
    tokens: int
    cut: bool
    pieces: list[tuple[str, bool]]


@dataclass(frozen=True)
class PartReport:
    """One part of the data, such as the rows to train on.

    Attributes:
        rows: That are as they should be; `used` are those that the limits leave.
        tokens: Of a row, before a limit cuts it; `learnt` are the predictions it is trained by, after that.
        duplicates: Rows that are there already, letter by letter; `near_duplicates` without regard to case and marks.
        repeated: Lines of the first duplicates, each group with its first line in front.
        contradictions: Inputs that have more than one answer.
        special: Special tokens of the tokenizer that stand in the text, with the number of rows.
        without_end: Rows that were not cut and whose last learnt token still does not end an answer.
        unlike_prompts: Conversations that generation would begin with other tokens than training does.
        packs: How many there are, and the share of their tokens that are of rows; None without packing.
    """

    name: str
    source: str
    rows: int
    used: int
    cut: int
    left_out: int
    tokens: Spread
    learnt: Spread
    duplicates: int
    near_duplicates: int
    repeated: list[list[int]]
    contradictions: int
    labels: dict[str, int] | None
    special: dict[str, int]
    without_end: int | None
    unlike_prompts: int | None
    packs: tuple[int, float] | None
    samples: list[Sample] = field(default_factory=list)


@dataclass(frozen=True)
class Leak:
    """Rows of one part that the training rows have too."""

    part: str
    same_inputs: int  # without regard to case and marks
    same_answers: int  # of these, with an answer that was trained on
    lines: list[tuple[int, int]]  # the first of them: line of the part, line of the training rows


@dataclass(frozen=True)
class Report:
    """Everything that `check` finds; `faults` are what training would refuse, `warnings` what it would not."""

    task: str
    columns: dict[str, Any]
    max_length: int
    parts: list[PartReport]
    leaks: list[Leak]
    faults: list[RowFault]
    warnings: list[str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
