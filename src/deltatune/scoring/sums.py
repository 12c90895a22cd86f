"""Scores as functions of sums over rows, so that a score of any resampled set of rows costs one product.

Every score here gives over all rows what the function of the same name in `deltatune.evaluate` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltatune.evaluate import entities, exact_match, rouge_l, rouge_n, squad_exact_match, squad_f1
from deltatune.evaluate.tags import are_bio

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Score:
    """`of(rows.sum(0))` is the score of all rows; `rows` is (rows, sums). `of` takes (..., sums).

    Attributes:
        rising: Whether more of it is better.
    """

    rows: Array
    of: Callable[[Array], Array]
    rising: bool = True

    @property
    def value(self) -> float:
        return float(self.of(self.rows.sum(0)))


def mean_of(values: Sequence[float]) -> Score:
    """The mean over the rows."""
    return Score(_table([(value, 1.0) for value in values]), lambda s: s[..., 0] / s[..., 1])


def loss_scores(rows: Sequence[tuple[float, int]], perplexity: bool) -> dict[str, Score]:
    """The mean over all targets of all rows, and e to the power of it."""
    table = _table(rows)
    found = {"loss": Score(table, _ratio, rising=False)}
    if perplexity:
        found["perplexity"] = Score(table, lambda s: np.exp(np.minimum(_ratio(s), 700.0)), rising=False)
    return found


def class_scores(predicted: Sequence[int], true: Sequence[int], classes: int) -> dict[str, Score]:
    """`accuracy` and `macro_f1`."""
    said, meant = np.eye(classes)[list(predicted)], np.eye(classes)[list(true)]
    parts = np.concatenate([said * meant, said, meant], axis=1)
    hits = [float(p == t) for p, t in zip(predicted, true, strict=True)]
    return {"accuracy": mean_of(hits), "macro_f1": Score(parts, _macro_f1)}


def tagged_scores(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> dict[str, Score]:
    """Those of `tag_scores`: accuracy over all words, and entities, or macro F1 where tags mark none."""
    pairs = list(zip(predicted, true, strict=True))
    words = [(sum(p == t for p, t in zip(said, meant, strict=True)), len(meant)) for said, meant in pairs]
    found = {"accuracy": Score(_table(words), _ratio)}
    names = sorted({tag for said, meant in pairs for tag in (*said, *meant)})
    if not are_bio(names):
        parts = [
            [sum(p == t == name for p, t in zip(said, meant)) for name in names]
            + [said.count(name) for name in names]
            + [meant.count(name) for name in names]
            for said, meant in ((list(said), list(meant)) for said, meant in pairs)
        ]
        return found | {"macro_f1": Score(_table(parts), _macro_f1)}
    both = [(set(entities(said)), set(entities(meant))) for said, meant in pairs]
    parts = _table([(len(said & meant), len(said), len(meant)) for said, meant in both])
    return found | {
        "precision": Score(parts, lambda s: _safe(s[..., 0], s[..., 1])),
        "recall": Score(parts, lambda s: _safe(s[..., 0], s[..., 2])),
        "f1": Score(parts, lambda s: _safe(2 * s[..., 0], s[..., 1] + s[..., 2])),
    }


def answer_scores(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Score]:
    """Of spans of a context: `squad_exact_match`, `squad_f1`."""
    return {
        "exact_match": mean_of(_each(squad_exact_match, outputs, references)),
        "f1": mean_of(_each(squad_f1, outputs, references)),
    }


def text_scores(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Score]:
    """Of written answers: `exact_match`, `rouge_n`, `rouge_l`, `bleu`."""
    return {
        "exact_match": mean_of(_each(exact_match, outputs, references)),
        "rouge_1": mean_of(_each(lambda o, r: rouge_n(o, r, 1), outputs, references)),
        "rouge_2": mean_of(_each(lambda o, r: rouge_n(o, r, 2), outputs, references)),
        "rouge_l": mean_of(_each(rouge_l, outputs, references)),
        "bleu": _bleu(outputs, references),
    }


def _bleu(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Corpus BLEU of sacrebleu: counts of matching and of all runs of 1 to 4 words, and the two lengths."""
    from sacrebleu.metrics import BLEU  # pyright: ignore[reportPrivateImportUsage]

    metric = BLEU()
    parts = []
    for output, row in zip(outputs, references, strict=True):
        found = metric.corpus_score([output], [[reference] for reference in row])
        parts.append([*found.counts, *found.totals, found.sys_len, found.ref_len])

    def one(sums: Array) -> float:
        counts = [int(count) for count in sums]
        return BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9], smooth_method="exp").score

    return Score(_table(parts), lambda s: np.apply_along_axis(one, -1, s))


def _each(score: Any, outputs: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    return [score([output], [row]) for output, row in zip(outputs, references, strict=True)]


def _macro_f1(sums: Array) -> Array:
    """(..., 3 * classes): hits, predicted, true; the mean over the classes that occur."""
    hit, said, meant = np.split(sums, 3, axis=-1)
    there = said + meant
    return _safe(_safe(2 * hit, there).sum(-1), (there > 0).sum(-1))


def _ratio(sums: Array) -> Array:
    return _safe(sums[..., 0], sums[..., 1])


def _safe(part: Array, whole: Array) -> Array:
    """0 where there is nothing to divide by."""
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=np.asarray(whole) != 0)


def _table(rows: Sequence[Sequence[float]]) -> Array:
    return np.asarray(rows, dtype=np.float64)
