"""Scores of tasks with a head: what was predicted for each row against what is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltatune.data.encode import Encoder
from deltatune.data.passages import Passage, Window
from deltatune.data.prepare import Part
from deltatune.data.tagging import Tagged, TaggedFeatures
from deltatune.evaluate import accuracy, macro_f1, read_spans, squad_exact_match, squad_f1, tag_scores, tags_of


def row_scores(part: Part, predicted: Sequence[Any], encoder: Encoder) -> dict[str, float]:
    """`predicted` is `Loss.predicted` in the order of `part.features`."""
    if encoder.task == "token_classification":
        return _of_tags(part, predicted, encoder)
    if encoder.task == "question_answering":
        return _of_answers(part, predicted, encoder)
    true = [row.labels[0] for row in part.features]
    return {"accuracy": accuracy(predicted, true), "macro_f1": macro_f1(predicted, true)}


def _of_tags(part: Part, predicted: Sequence[Sequence[int]], encoder: Encoder) -> dict[str, float]:
    """Over all words of all rows, those that were cut off included."""
    return tag_scores(*tags_and_truth(part, predicted, encoder))


def tags_and_truth(
    part: Part, predicted: Sequence[Sequence[int]], encoder: Encoder
) -> tuple[list[list[str]], list[tuple[str, ...]]]:
    """A tag for every word of every row, and the right ones."""
    assert encoder.labels is not None
    said, true = [], []
    for example, row, numbers in zip(part.examples, part.features, predicted, strict=True):
        assert isinstance(example, Tagged) and isinstance(row, TaggedFeatures)
        said.append(tags_of(row, numbers, len(example.words), encoder.labels.keys))
        true.append(tuple(example.tags))
    return said, true


def _of_answers(part: Part, predicted: Sequence[Any], encoder: Encoder) -> dict[str, float]:
    """Over all rows, whether or not a window holds the whole answer."""
    answers, references = answers_and_truth(part, predicted, encoder)
    return {"exact_match": squad_exact_match(answers, references), "f1": squad_f1(answers, references)}


def answers_and_truth(part: Part, predicted: Sequence[Any], encoder: Encoder) -> tuple[list[str], list[list[str]]]:
    """The answer found in every row's context, and those that are right."""
    windows = [row for row in part.features if isinstance(row, Window)]
    passages = [example for example in part.examples if isinstance(example, Passage)]
    answers = read_spans(windows, predicted, [passage.context for passage in passages], encoder.answer_length)
    return answers, [[span.text for span in passage.answers] for passage in passages]
