"""Scores of single held-out rows, which is what two candidates are compared by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from deltatune.data.example import TEXT_TASKS
from deltatune.data.passages import Passage, Window
from deltatune.data.prepare import Part
from deltatune.errors import ConfigError
from deltatune.evaluate import (
    dataset_loss,
    exact_match,
    read_spans,
    rouge_l,
    squad_exact_match,
    squad_f1,
)
from deltatune.train import randomness
from deltatune.train.base import autocast
from deltatune.train.judge import Judge

LOWER_IS_BETTER = {"loss"}
_TEXT = ("loss", "rouge_l", "exact_match")
METRICS = {  # by task, the usual one first
    **dict.fromkeys(sorted(TEXT_TASKS), _TEXT),
    "classification": ("accuracy", "loss"),
    "token_classification": ("accuracy", "loss"),
    "question_answering": ("f1", "exact_match", "loss"),
}


@dataclass(frozen=True)
class RowScores:
    """A score of every held-out row, and how much each counts: the tokens that a mean loss is over, say."""

    values: list[float]
    weights: list[int]

    @property
    def mean(self) -> float:
        return sum(v * w for v, w in zip(self.values, self.weights)) / max(sum(self.weights), 1)


def choose_metric(task: str, asked: str) -> str:
    """The metric of a comparison; `auto` is the usual one of the task."""
    if asked == "auto":
        return METRICS[task][0]
    if asked not in METRICS[task]:
        raise ConfigError(
            f"metric={asked!r} is not there for task {task}; expected {', '.join(METRICS[task])}",
            field="metric",
            found=asked,
            expected=list(METRICS[task]),
        )
    return asked


def score_rows(judge: Judge, model: nn.Module, part: Part, metric: str) -> RowScores:
    """How good a trained model is at each row of a part (at each question, where answers are scored)."""
    if metric in ("rouge_l", "exact_match") and judge.settings.task in TEXT_TASKS:
        return _answers(judge, model, part, rouge_l if metric == "rouge_l" else exact_match)
    assert judge.corpus.collator is not None
    collate = judge.corpus.collator
    # batches of one row: the loss is the model's own mean, which cannot be taken apart for several
    batches = (collate([row]) for row in part.features)
    with randomness.untouched(), autocast(judge.settings, judge.device):
        found = dataset_loss(model, batches, judge.settings.task, judge.device)
    if metric == "loss":
        return RowScores([total / max(n, 1) for total, n in found.batches], [n for _, n in found.batches])
    if judge.settings.task == "classification":
        return _shares([[got == row.labels[0]] for got, row in zip(found.predicted, part.features)])
    if judge.settings.task == "token_classification":
        told = [[label for label in row.labels if label >= 0] for row in part.features]
        return _shares([[g == t for g, t in zip(got, true)] for got, true in zip(found.predicted, told)])
    return _spans(judge, part, found.predicted, squad_f1 if metric == "f1" else squad_exact_match)


def _shares(hits: list[list[bool]]) -> RowScores:
    return RowScores([sum(row) / max(len(row), 1) for row in hits], [len(row) for row in hits])


def _answers(judge: Judge, model: nn.Module, part: Part, score: Any) -> RowScores:
    questions = judge.questions(part, len(part.examples))
    answers = judge.answers(model, questions)
    values = [score([said], [question.references]) for said, question in zip(answers, questions)]
    return RowScores(values, [1] * len(values))


def _spans(judge: Judge, part: Part, predicted: list[Any], score: Any) -> RowScores:
    assert judge.corpus.encoder is not None
    windows = [row for row in part.features if isinstance(row, Window)]
    passages = [example for example in part.examples if isinstance(example, Passage)]
    contexts = [passage.context for passage in passages]
    answers = read_spans(windows, predicted, contexts, judge.corpus.encoder.answer_length)
    values = [score([said], [[span.text for span in passage.answers]]) for said, passage in zip(answers, passages)]
    return RowScores(values, [1] * len(values))
