"""EVA's search: components of every layer's inputs, until those that count among all layers have settled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import DataError
from deltatune.lora.components import Components

PASSES = 100  # over the data, after which components that have not settled are given up


@dataclass
class Watched:
    """A layer, or several with the same input, of which the first is looked at.

    Attributes:
        names: Of the layers.
        limit: The most components that one of them may get.
    """

    module: nn.Module
    rows: Callable[..., Tensor]
    names: list[str]
    limit: int
    components: Components = field(init=False)
    settled: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.components, self.settled = Components(self.limit), torch.zeros(self.limit, dtype=torch.bool)

    def add(self, X: Tensor, tau: float) -> None:
        before = self.components.V
        self.components.add(X)
        if before is not None and self.components.V is not None:
            self.settled = torch.cosine_similarity(self.components.V, before).cpu() >= tau


def settle(
    watched: list[Watched], dataloader: Iterable[Any], budget: int, tau: float, run: Callable[..., None]
) -> dict[str, int]:
    """Run until the components that count have settled; name -> how many of them a layer gets."""
    counts = {name: watch.limit for watch in watched for name in watch.names}
    for _ in range(PASSES):
        for batch in dataloader:
            open_ = [watch for watch in watched if not watch.settled[: counts[watch.names[0]]].all()]
            if not open_:
                return counts
            run(batch, {watch.module: _fitting(watch, tau) for watch in open_})
            if all(watch.components.V is not None for watch in watched):
                counts = _distributed(watched, budget)
        for watch in watched:
            if watch.components.V is None:
                raise DataError(
                    f"EVA: no batch has the {watch.limit} tokens that {watch.names[0]} needs for as many components; "
                    "use larger batches, a smaller r or rho, or use_label_mask=False",
                    path=watch.names[0],
                    expected=watch.limit,
                )
    raise DataError(
        f"EVA: the components have not settled in {PASSES} passes over the data; use more data or a smaller tau",
        found=[watch.names[0] for watch in watched if not watch.settled.all()],
    )


def _fitting(watch: Watched, tau: float) -> Callable[[Any, Any], None]:
    def look(x: Any, places: Any) -> None:
        X = watch.rows(x, places)
        if len(X) >= watch.limit:
            watch.add(X, tau)

    return look


def in_order(watched: list[Watched]) -> Iterator[tuple[Watched, str]]:
    """The layers, first those that are looked at: with equal shares of variance, these get the rank."""
    yield from ((watch, watch.names[0]) for watch in watched)
    yield from ((watch, name) for watch in watched for name in watch.names[1:])


def _distributed(watched: list[Watched], budget: int) -> dict[str, int]:
    """The `budget` components with the largest shares of their layers' variance."""
    owners = [name for watch, name in in_order(watched) for _ in watch.components.share]
    shares = torch.cat([watch.components.share for watch, _ in in_order(watched)])
    most = Counter(owners[place] for place in shares.argsort(descending=True)[:budget].tolist())
    for watch in watched:
        first, *others = watch.names
        for name in others:  # they share what settles for the first, which therefore has the most
            most[first], most[name] = max(most[first], most[name]), min(most[first], most[name])
    return {name: most[name] for _, name in in_order(watched)}


def chosen(watch: Watched, count: int, whiten: bool) -> Tensor:
    V = watch.components.V
    assert V is not None
    A = V[:count] / watch.components.S[:count, None].sqrt() if whiten else V[:count]
    return A.float().clone()
