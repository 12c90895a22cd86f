"""What a model with a head on its tokens says of texts: their tags, or the answer in their context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from deltatune.data.collate import Collator
from deltatune.data.encode import Encoder
from deltatune.data.passages import Passage, windows
from deltatune.data.tagging import Tagged, TaggedFeatures, features
from deltatune.evaluate.loss import dataset_loss
from deltatune.evaluate.spans import read_spans
from deltatune.evaluate.tags import shown

OUTSIDE = "O"  # the tag of a word that the model did not see


def read(
    model: nn.Module,
    encoder: Encoder,
    texts: Sequence[str],
    *,
    task_ids: Sequence[int] | None = None,
    batch_size: int = 16,
    device: torch.device | None = None,
    after_batch: Callable[[int], Any] = lambda done: None,
) -> list[str]:
    """One line for each text, for people to read. Texts of passages are a question, a line break, and the context."""
    ids = list(task_ids or [None] * len(texts))
    if encoder.task == "question_answering":
        passages = [Passage.of(text) for text in texts]
        rows = [window for row, passage in enumerate(passages) for window in windows(encoder, passage, row)]
        rows = [replace(window, task_id=ids[window.row]) for window in rows]
        found = _predicted(model, encoder, rows, batch_size, device, after_batch)
        return read_spans(rows, found, [passage.context for passage in passages], encoder.answer_length)
    assert encoder.labels is not None
    examples = [Tagged.of(text) for text in texts]
    tagged = [replace(features(encoder, example, "input")[0], task_id=id) for example, id in zip(examples, ids)]
    found = _predicted(model, encoder, tagged, batch_size, device, after_batch)
    names = encoder.labels.names
    return [
        shown(example.words, tags_of(row, numbers, len(example.words), names))
        for example, row, numbers in zip(examples, tagged, found)
    ]


def tags_of(row: TaggedFeatures, numbers: Sequence[int], words: int, names: Sequence[str]) -> list[str]:
    """A tag for every word: those that were cut off, or have no token of their own, are outside of entities."""
    tags = [OUTSIDE] * words
    for word, number in zip(row.words, numbers):
        tags[word] = names[number]
    return tags


def _predicted(
    model: nn.Module, encoder: Encoder, rows: Sequence[Any], batch_size: int, device: torch.device | None, after: Any
) -> list[Any]:
    """Predictions in the order of the rows; rows without a label to learn are read too."""
    collate = Collator(encoder.tokenizer.pad_token_id or 0, encoder.task)
    order = sorted(range(len(rows)), key=lambda i: rows[i].length)
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    batches = (collate([rows[i] for i in chunk]) for chunk in chunks)
    loss = dataset_loss(model, batches, encoder.task, device or torch.device("cpu"), after)
    found = dict(zip(order, loss.predicted))
    return [found[i] for i in range(len(rows))]
