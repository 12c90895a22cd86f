"""How numbers are spread: percentiles, and counts by range for a histogram."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BINS = 8


@dataclass(frozen=True)
class Spread:
    """`bins` are (from, to, count), both ends included, of equal width but for the last."""

    count: int
    total: int
    least: int
    p50: int
    p90: int
    p99: int
    most: int
    bins: list[tuple[int, int, int]]

    @classmethod
    def of(cls, values: Sequence[int]) -> Spread:
        if not values:
            return cls(0, 0, 0, 0, 0, 0, 0, [])
        ordered = sorted(values)
        p50, p90, p99 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.9, 0.99))
        return cls(len(ordered), sum(ordered), ordered[0], p50, p90, p99, ordered[-1], _bins(ordered, p99))


def _bins(ordered: list[int], last: int) -> list[tuple[int, int, int]]:
    """Up to `last`, so that a few huge values do not squeeze all others into one; the last bin takes them."""
    least, most = ordered[0], ordered[-1]
    width = max(1, -(-(last - least + 1) // BINS))
    starts = range(least, last + 1, width)
    ends = [*(start + width - 1 for start in starts[:-1]), most]
    return [(start, end, sum(start <= value <= end for value in ordered)) for start, end in zip(starts, ends)]
