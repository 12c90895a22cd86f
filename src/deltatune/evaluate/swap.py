"""The same outputs against another input's references: what fluent text scores without having read its input."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from deltatune.errors import DataError

Row = TypeVar("Row")


def swapped(rows: Sequence[Row], inputs: Sequence[Hashable]) -> list[Row]:
    """Each row's partner: the row half the list away, or the next one after it whose input differs."""
    if len(rows) != len(inputs) or len(set(inputs)) < 2:
        raise DataError(
            f"{len(rows)} rows, {len(set(inputs))} different inputs; swapping needs two different inputs",
            field="inputs",
            found=len(set(inputs)),
            expected=2,
        )
    count = len(rows)

    def partner(i: int) -> int:
        places = ((i + count // 2 + k) % count for k in range(count))
        return next(j for j in places if inputs[j] != inputs[i])

    return [rows[partner(i)] for i in range(count)]


def swapped_score(
    score: Callable[[Sequence[str], Sequence[Sequence[str]]], float],
    outputs: Sequence[str],
    references: Sequence[Sequence[str]],
    inputs: Sequence[Hashable],
) -> float:
    """`score` of the outputs against the references of other inputs; compare it with the true score."""
    return score(outputs, swapped(references, inputs))
