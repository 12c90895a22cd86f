"""What comes out: scores with their intervals for every model, and a few answers side by side."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from deltatune.scoring.bootstrap import Interval


@dataclass(frozen=True)
class Evaluated:
    """One model: the base, or the base with one adapter.

    Attributes:
        differences: Its scores less the base's over the same rows; empty for the base, and where there is none.
        forgetting: Loss per token on neutral text; `forgotten` is that less the base's. None where none was asked for.
        harness: Task -> metric -> value, of lm-evaluation-harness.
    """

    name: str
    folder: str | None
    scores: dict[str, Interval] = field(default_factory=dict)
    differences: dict[str, Interval] = field(default_factory=dict)
    forgetting: Interval | None = None
    forgotten: Interval | None = None
    harness: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """An input, what is right, and what each model answers."""

    input: str
    references: tuple[str, ...]
    answers: dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """All of it.

    Attributes:
        rows: Rows of the data that were read; `inputs` are the different ones that were answered in writing.
        neutral: Where the neutral text is from, and how much of it there is.
        rising: The scores of which more is better.
    """

    task: str
    source: str | None
    rows: int
    inputs: int
    level: float
    models: list[Evaluated]
    samples: list[Sample]
    neutral: str | None = None
    rising: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
