"""The mean loss over a data set: every target counts the same, however the rows are batched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deltatune.data.example import CAUSAL_TASKS
from deltatune.data.features import IGNORE


@dataclass(frozen=True)
class Loss:
    """Mean negative log-likelihood per target token (per row for classes and spans), and what was predicted.

    Attributes:
        predicted: For each row its class, or the class at each labelled token, or two tensors (T,) of logits of being
            the first and the last token of a span. Empty for text.
        rows: For each row the sum of its losses and their number, where they were asked for.
        batches: The sum of the losses of each batch, and how many targets it is over.
    """

    mean: float
    targets: int
    predicted: list[Any] = field(default_factory=list)
    rows: list[tuple[float, int]] = field(default_factory=list)
    batches: list[tuple[float, int]] = field(default_factory=list)


def joined(parts: list[Loss]) -> Loss:
    """Losses over parts of a data set as one over all of it."""
    count = sum(part.targets for part in parts)
    total = sum(part.mean * part.targets for part in parts)
    predicted = [found for part in parts for found in part.predicted]
    return Loss(total / max(count, 1), count, predicted, [row for part in parts for row in part.rows])


def target_count(labels: Tensor, task: str) -> int:
    """How many predictions the model's own mean loss is over."""
    if task == "classification":
        return labels.shape[0]
    return int(((labels[:, 1:] if task in CAUSAL_TASKS else labels) != IGNORE).sum())


@torch.no_grad()
def dataset_loss(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    task: str,
    device: torch.device,
    after_batch: Callable[[int], Any] = lambda done: None,
    by_row: bool = False,
) -> Loss:
    """Evaluate; the model's training mode is put back. `after_batch` is told how many batches are done.

    With `by_row` losses are cross-entropies of the logits, of every row for itself; else they are the model's own.
    """
    was_training = model.training
    model.eval()
    predicted: list[Any] = []
    sums: list[tuple[float, int]] = []
    rows: list[tuple[float, int]] = []
    judged = _spans if task == "question_answering" else _labels
    try:
        for done, batch in enumerate(batches, 1):
            placed = {name: tensor.to(device) for name, tensor in batch.items()}
            loss, number, found = judged(model, placed, task, rows if by_row else None)
            sums.append((loss, number))
            predicted += found
            after_batch(done)
    finally:
        model.train(was_training)
    count = sum(number for _, number in sums)
    return Loss(sum(loss for loss, _ in sums) / max(count, 1), count, predicted, rows, sums)


def _labels(
    model: nn.Module, batch: dict[str, Tensor], task: str, rows: list[tuple[float, int]] | None
) -> tuple[float, int, list[Any]]:
    """(sum of losses, how many, predictions) of a batch, by the model's own loss; by its logits where `rows` asks."""
    labels = batch["labels"]
    number = target_count(labels, task)
    output = model(**batch)
    predicted = []
    if task == "classification":
        predicted = output.logits.argmax(-1).tolist()
    elif task == "token_classification":
        best = _of_tokens(output.logits, batch).argmax(-1)
        predicted = [row[seen].tolist() for row, seen in zip(best, labels != IGNORE)]
    if rows is not None:
        found = _of_rows(output.logits, batch, task)
        rows += found
        return sum(loss for loss, _ in found), number, predicted
    return float(output.loss) * number if number else 0.0, number, predicted


def _of_rows(logits: Tensor, batch: dict[str, Tensor], task: str) -> list[tuple[float, int]]:
    """(sum of cross-entropies, how many) of each row."""
    labels = batch["labels"]
    if task == "classification":
        return [(loss, 1) for loss in cross_entropy(logits.float(), labels, reduction="none").tolist()]
    if task != "seq2seq":  # a decoder's logits are its answer's own
        logits = _of_tokens(logits, batch)
    if task in CAUSAL_TASKS:
        logits, labels = logits[:, :-1], labels[:, 1:]
    found = []
    for row, wanted in zip(logits, labels):
        loss = cross_entropy(row.float(), wanted, ignore_index=IGNORE, reduction="sum")
        found.append((float(loss), int((wanted != IGNORE).sum())))
    return found


def _spans(
    model: nn.Module, batch: dict[str, Tensor], task: str, rows: list[tuple[float, int]] | None
) -> tuple[float, int, list[Any]]:
    """The same for spans. Padding cannot be chosen, so that the other rows of a batch change nothing."""
    wanted = [batch.pop("start_positions"), batch.pop("end_positions")]
    output = model(**batch)
    padding = batch["attention_mask"] == 0
    both = [
        _of_tokens(logits, batch).float().masked_fill(padding, -torch.inf)
        for logits in (output.start_logits, output.end_logits)
    ]
    losses = [cross_entropy(one, place, ignore_index=IGNORE, reduction="none") for one, place in zip(both, wanted)]
    number = int((wanted[0] != IGNORE).sum())
    each = ((losses[0] + losses[1]) / 2).tolist()
    if rows is not None:
        rows += [(loss, int(place != IGNORE)) for loss, place in zip(each, wanted[0].tolist())]
    return sum(each), number, list(zip(both[0].cpu(), both[1].cpu()))


def _of_tokens(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Those of the tokens of the batch; methods that put virtual tokens in front may have logits for them too."""
    return logits[:, -batch["input_ids"].shape[1] :]
