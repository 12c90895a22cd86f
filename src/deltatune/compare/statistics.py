"""Which differences between candidates are more than noise.

Two things vary: which rows were held out, and the seed. Rows are many, so they are drawn again (the bootstrap, the same
rows for both candidates: https://aclanthology.org/W04-3250). Seeds are few, and drawing again from three of them would
make their spread look too small, so their part is Student's t with the spread seen between the seeds. A difference is
told where it stands out at 5 % among all pairs together (Holm).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05
DRAWS = 20_000
LEAST_SEEDS = 2
LEAST_ROWS = 30
_CHUNK = 500  # draws at a time: their counts are a matrix of (draws, rows)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A score with its interval of 95 %; none where it cannot be told."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Pair:
    """Two candidates by number: the first's score less the second's, its interval, and whether it is told from 0."""

    first: int
    second: int
    difference: Estimate
    p: float
    differs: bool


@dataclass(frozen=True)
class Findings:
    """Attributes:
    undecided: Why nothing can be decided; then there are no pairs.
    groups: Sets of candidates that are not told apart from each other, each as large as can be.
    """

    scores: list[Estimate]
    pairs: list[Pair]
    groups: list[list[int]]
    undecided: str | None = None

    def differ(self, first: int, second: int) -> bool:
        return any({pair.first, pair.second} == {first, second} and pair.differs for pair in self.pairs)


def judge(values: Array, weights: Array, seed: int = 0) -> Findings:
    """Compare all candidates.

    Args:
        values: Scores (candidates, seeds, rows).
        weights: How much each row counts (rows,).
    """
    count, seeds, rows = values.shape
    by_seed = values @ weights / weights.sum()  # (candidates, seeds)
    means = by_seed.mean(1)
    reason = why_undecided(seeds, rows)
    if reason is not None:
        return Findings([Estimate(float(mean)) for mean in means], [], [list(range(count))], reason)
    random = np.random.default_rng(seed)
    rows_part = _drawn_again(values.mean(1), weights, random) - means  # (draws, candidates)
    scores = [_estimate(means[i], rows_part[:, i] + _seeds_part(by_seed[i], random)) for i in range(count)]
    found = []
    for i, j in combinations(range(count), 2):
        difference = means[i] - means[j]
        drawn = rows_part[:, i] - rows_part[:, j] + _seeds_part(by_seed[i] - by_seed[j], random)
        found.append((i, j, _estimate(difference, drawn), _p(difference, drawn)))
    told = holm([p for *_, p in found])
    pairs = [Pair(i, j, difference, p, differs) for (i, j, difference, p), differs in zip(found, told)]
    return Findings(scores, pairs, groups(count, [(p.first, p.second) for p in pairs if p.differs]))


def why_undecided(seeds: int, rows: int) -> str | None:
    """Why no difference can be told from noise; None where one can."""
    if seeds < LEAST_SEEDS:
        return f"one seed says nothing about how far another would be from it; give {LEAST_SEEDS} or more (seeds: 3)"
    if rows < LEAST_ROWS:
        return f"{rows} held-out rows are too few to tell chance from skill; give {LEAST_ROWS} or more"
    return None


def holm(p: Sequence[float], level: float = LEVEL) -> list[bool]:
    """Which hypotheses fall when all are tested at one level together (Holm 1979)."""
    fallen = [False] * len(p)
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[index] > level / (len(p) - rank):
            break
        fallen[index] = True
    return fallen


def groups(count: int, different: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The largest sets in which no two differ (insert and absorb: https://doi.org/10.1198/1061860043515)."""
    found = [frozenset(range(count))]
    for pair in different:
        split = [group - {one} for group in found if group >= set(pair) for one in pair]
        candidates = {*split, *(group for group in found if not group >= set(pair))}
        found = [group for group in candidates if not any(group < other for other in candidates)]
    return sorted(sorted(group) for group in found)


def _drawn_again(values: Array, weights: Array, random: np.random.Generator) -> Array:
    """Means over rows drawn with replacement, the same for all: (candidates, rows) to (draws, candidates)."""
    rows = values.shape[1]
    weighted = (values * weights).T
    drawn = []
    for start in range(0, DRAWS, _CHUNK):
        counts = random.multinomial(rows, np.full(rows, 1 / rows), size=min(_CHUNK, DRAWS - start)).astype(np.float64)
        drawn.append((counts @ weighted) / np.maximum(counts @ weights, 1e-300)[:, None])
    return np.concatenate(drawn)


def _seeds_part(by_seed: Array, random: np.random.Generator) -> Array:
    """How far a mean over so many seeds may be from that over all seeds: (seeds,) to (draws,)."""
    seeds = len(by_seed)
    return by_seed.std(ddof=1) / np.sqrt(seeds) * random.standard_t(seeds - 1, DRAWS)


def _estimate(mean: float, around: Array) -> Estimate:
    low, high = np.quantile(around, [LEVEL / 2, 1 - LEVEL / 2])
    return Estimate(float(mean), float(mean + low), float(mean + high))


def _p(difference: float, around: Array) -> float:
    """How often a difference of at least this size would come about by chance."""
    return float((np.sum(np.abs(around) >= abs(difference) - 1e-12) + 1) / (len(around) + 1))
