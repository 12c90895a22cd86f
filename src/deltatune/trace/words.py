"""Numbers and shapes as both renderings write them."""

from __future__ import annotations

from collections.abc import Sequence


def shape(value: Sequence[int] | None) -> str:
    return "none" if value is None else "×".join(str(side) for side in value) or "scalar"


def number(value: float | None) -> str:
    """Three figures."""
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:.3g}"


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3g} %" if whole else "–"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def name(where: str) -> str:
    """The last part of `module:qualname`."""
    return where.rpartition(":")[2]


def change(before: Sequence[int] | None, after: Sequence[int] | None) -> str:
    """A shape, or two with an arrow where they differ."""
    return shape(after) if before == after else f"{shape(before)} → {shape(after)}"
