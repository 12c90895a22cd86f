"""A study: one method on one task. A learning rate is chosen on dev rows with the first seed, then all seeds run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deltatune.errors import RequestError
from harness.cells import Cell, Spec, Store


@dataclass(frozen=True)
class Study:
    """`spec` with the first seed and no value for the knob yet.

    Attributes:
        knob: The hyper-parameter that is searched.
        grid: Its values, the likeliest first; every method that trains gets as many. Empty: nothing to choose.
        seeds: One for whatever has no randomness in it.
        score: Which dev score chooses.
        lower_is_better: For losses.
    """

    spec: Spec
    knob: str = "learning_rate"
    grid: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0,)
    score: str = "accuracy"
    lower_is_better: bool = False

    @property
    def label(self) -> str:
        return f"{self.spec.task}/{self.spec.method}"

    @property
    def size(self) -> int:
        """How many cells the whole study has."""
        return max(len(self.grid), 1) + len(self.seeds) - 1

    def tries(self) -> list[Spec]:
        """The grid at the first seed."""
        first = replace(self.spec, seed=self.seeds[0])
        return [first.with_hyper(**{self.knob: value}) for value in self.grid] or [first]

    def tried(self, store: Store) -> list[Cell]:
        return [cell for spec in self.tries() if (cell := store.get(spec)) is not None]

    def chosen(self, store: Store) -> Cell | None:
        """The best of what was tried so far; the earlier in the grid on a tie."""
        tried = self.tried(store)
        if len(self.grid) < 2 or not tried:
            return tried[0] if tried else None
        sign = -1.0 if self.lower_is_better else 1.0
        return max(tried, key=lambda cell: sign * cell.result["dev"][self.score])

    def repeats(self, store: Store) -> list[Spec]:
        """The chosen setting with the further seeds; nothing before the whole grid was tried."""
        chosen = self.chosen(store)
        if chosen is None or len(self.tried(store)) < len(self.tries()):
            return []
        return [replace(chosen.spec, seed=seed) for seed in self.seeds[1:]]

    def runs(self, store: Store) -> list[Cell]:
        """The finished cells of the chosen setting, one per seed."""
        chosen = self.chosen(store)
        if chosen is None:
            return []
        return [chosen, *(cell for spec in self.repeats(store) if (cell := store.get(spec)) is not None)]

    def cells(self, store: Store) -> list[Cell]:
        """All of its cells that are there: the grid, then further seeds."""
        return [*self.tried(store), *self.runs(store)[1:]]

    def finished(self, store: Store) -> int:
        """How many of the `size` cells are there."""
        return len(self.cells(store))


def pending(studies: Sequence[Study], store: Store) -> Iterator[Spec]:
    """What is missing, the most telling first: each method once, then the rest of its grid, then further seeds.

    Lazy: which setting gets further seeds is known only once its grid is in the store.
    """
    for study in studies:
        yield from _missing(study.tries()[:1], store)
    for study in studies:
        yield from _missing(study.tries()[1:], store)
    for place in range(max((len(study.seeds) for study in studies), default=1) - 1):
        for study in studies:
            yield from _missing(study.repeats(store)[place : place + 1], store)


def _missing(specs: Sequence[Spec], store: Store) -> Iterator[Spec]:
    for spec in specs:
        if store.get(spec) is None:
            yield spec


def select(studies: Sequence[Study], only: str | None) -> list[Study]:
    """The studies that `only` names: tasks, methods or task/method, separated by commas."""
    if not only:
        return list(studies)
    words = [word.strip() for word in only.split(",") if word.strip()]
    names: dict[str, list[Any]] = {}
    for study in studies:
        for name in (study.spec.task, study.spec.method, study.label):
            names.setdefault(name, []).append(study)
    unknown = [word for word in words if word not in names]
    if unknown:
        raise RequestError(
            f"--only {only}: {unknown[0]!r} is none of {', '.join(sorted(names))}", field="only", found=only
        )
    return [study for study in studies if any(study in names[word] for word in words)]
