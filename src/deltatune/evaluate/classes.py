"""Predicted classes against true ones."""

from __future__ import annotations

from collections.abc import Sequence


def accuracy(predicted: Sequence[int], true: Sequence[int]) -> float:
    """Share of right answers."""
    return sum(p == t for p, t in zip(predicted, true, strict=True)) / len(true)


def macro_f1(predicted: Sequence[int], true: Sequence[int]) -> float:
    """Mean over the classes that occur, in either, of 2 TP / (2 TP + FP + FN)."""
    classes = set(predicted) | set(true)
    pairs = list(zip(predicted, true, strict=True))

    def f1(c: int) -> float:
        hit = sum(p == t == c for p, t in pairs)
        return 2 * hit / (sum(p == c for p, _ in pairs) + sum(t == c for _, t in pairs))

    return sum(f1(c) for c in classes) / len(classes)
