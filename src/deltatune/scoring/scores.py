"""One model on the rows: its scores as sums over rows, and its answers as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltatune.data.example import CAUSAL_TASKS, TEXT_TASKS
from deltatune.data.prepare import Corpus, Part
from deltatune.data.tagging import Tagged
from deltatune.evaluate import Question, answer, shown
from deltatune.generate.load import Ready
from deltatune.scoring.rows import encoded, losses
from deltatune.scoring.sums import Score, answer_scores, class_scores, loss_scores, tagged_scores, text_scores
from deltatune.train.base import autocast
from deltatune.train.events import Listener
from deltatune.train.judge import Judge
from deltatune.train.scores import answers_and_truth, tags_and_truth


@dataclass(frozen=True)
class Asked:
    """How models are asked.

    Attributes:
        written: Whether answers are written, where the task is one of text, and scored.
        max_new_tokens: Of an answer; as in training where it is None.
    """

    written: bool = True
    batch_size: int = 16
    num_beams: int = 1
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Seen:
    """`answers[i]` is to the i-th of `inputs`, of which `references[i]` are right."""

    scores: dict[str, Score]
    inputs: list[str]
    references: list[tuple[str, ...]]
    answers: list[str]


def seen(corpus: Corpus, ready: Ready, asked: Asked, listener: Listener, tasks: bool = True) -> Seen:
    """`ready.model` is asked as it stands: whoever calls this has chosen the adapter."""
    corpus = encoded(corpus, ready, tasks)
    listener.on_stage("evaluate", -(-len(corpus.train.features) // asked.batch_size))
    loss = losses(corpus, ready, asked.batch_size, listener.on_stage_progress)
    scores = loss_scores(loss.rows, perplexity=ready.task in TEXT_TASKS)
    if ready.task in TEXT_TASKS:
        return _of_text(corpus, ready, asked, listener, scores)
    found, answers, references = _of_heads(corpus, loss.predicted)
    return Seen({**scores, **found}, [example.text for example in corpus.train.examples], references, answers)


def _of_text(corpus: Corpus, ready: Ready, asked: Asked, listener: Listener, scores: dict[str, Score]) -> Seen:
    if not asked.written:
        return Seen(scores, [], [], [])
    assert ready.settings is not None and corpus.encoder is not None and corpus.collator is not None
    judge = Judge(ready.settings, corpus, ready.tokenizer, None, listener)  # it only finds the questions
    questions: list[Question] = judge.questions(corpus.train, len(corpus.train.examples))
    listener.on_stage("answers", len(questions))
    ids = [question.task_id for question in questions if question.task_id is not None]
    device = next(ready.model.parameters()).device
    with autocast(ready.settings, device):
        answers = answer(
            ready.model,
            ready.tokenizer,
            [question.prompt for question in questions],
            causal=ready.task in CAUSAL_TASKS,
            max_new_tokens=asked.max_new_tokens or corpus.encoder.answer_length,
            task_ids=ids if ids and corpus.collator.task_ids else None,
            max_length=corpus.encoder.max_length,
            num_beams=asked.num_beams,
            batch_size=asked.batch_size,
            device=device,
            after_batch=listener.on_stage_progress,
        )
    references = [question.references for question in questions]
    if corpus.columns.form != "text":  # what really followed is not the only right way to go on
        scores = {**scores, **text_scores(answers, references)}
    return Seen(scores, [question.text for question in questions], references, answers)


def _of_heads(corpus: Corpus, predicted: Sequence[Any]) -> tuple[dict[str, Score], list[str], list[tuple[str, ...]]]:
    part, encoder, labels = corpus.train, corpus.encoder, corpus.labels
    assert encoder is not None
    if corpus.task == "token_classification":
        said, true = tags_and_truth(part, predicted, encoder)
        words = [example.words for example in part.examples if isinstance(example, Tagged)]
        return tagged_scores(said, true), _shown(words, said), [(text,) for text in _shown(words, true)]
    if corpus.task == "question_answering":
        answers, references = answers_and_truth(part, predicted, encoder)
        return answer_scores(answers, references), answers, [tuple(dict.fromkeys(row)) for row in references]
    assert labels is not None
    true = _classes(part)
    names = labels.names
    return class_scores(predicted, true, len(names)), [names[i] for i in predicted], [(names[i],) for i in true]


def _classes(part: Part) -> list[int]:
    return [row.labels[0] for row in part.features]


def _shown(words: Sequence[Sequence[str]], tags: Sequence[Sequence[str]]) -> list[str]:
    return [shown(row, found) for row, found in zip(words, tags, strict=True)]
