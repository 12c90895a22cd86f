"""Intervals by the bootstrap: the rows drawn again with replacement, many times, and the middle of what scores become.

Both sides of a difference see the same draws, row by row (a paired bootstrap), so that rows that are hard for both do
not widen it.   https://aclanthology.org/W04-3250
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deltatune.scoring.sums import Array, Score

DRAWS, LEVEL = 1000, 0.95


@dataclass(frozen=True)
class Interval:
    """A value with the bounds that hold the given share of all draws."""

    value: float
    low: float
    high: float

    @property
    def away_from_zero(self) -> bool:
        return self.low > 0 or self.high < 0


class Draws:
    """`count` resamplings of `rows` rows, the same for every score that is asked."""

    def __init__(self, rows: int, count: int = DRAWS, seed: int = 0, level: float = LEVEL) -> None:
        self.level = level
        generator = np.random.default_rng(seed)
        # how often each row is drawn: (draws, rows)
        self.counts: Array = generator.multinomial(rows, np.full(rows, 1 / rows), size=count).astype(np.float64)

    def interval(self, score: Score) -> Interval:
        return self._between(score.value, self._drawn(score))

    def difference(self, score: Score, base: Score) -> Interval:
        """`score` less `base`, over the same rows."""
        return self._between(score.value - base.value, self._drawn(score) - self._drawn(base))

    def _drawn(self, score: Score) -> Array:
        return score.of(self.counts @ score.rows)

    def _between(self, value: float, drawn: Array) -> Interval:
        rest = (1 - self.level) / 2
        low, high = np.quantile(drawn, [rest, 1 - rest])
        return Interval(value, float(low), float(high))
