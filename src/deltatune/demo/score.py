"""How good outputs are: close to the entry, faithful to the record, and different for another record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltatune.demo.grammar import Row
from deltatune.evaluate import bleu, exact_match, present_share, swapped_score


@dataclass(frozen=True)
class Scores:
    """BLEU 0 to 100, shares 0 to 1. `swapped_bleu` is that of the same outputs against other records' entries."""

    bleu: float
    swapped_bleu: float
    names: float
    exact: float


def score(outputs: Sequence[str], rows: Sequence[Row]) -> Scores:
    references = [(row.target,) for row in rows]
    inputs = [row.input for row in rows]
    return Scores(
        bleu=bleu(outputs, references),
        swapped_bleu=swapped_score(bleu, outputs, references, inputs),
        names=present_share(outputs, [row.names for row in rows]),
        exact=exact_match(outputs, references),
    )
