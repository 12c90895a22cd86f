"""The mean loss over a data set: every target counts the same, however the rows are batched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.data.encode import IGNORE


@dataclass(frozen=True)
class Loss:
    """Mean negative log-likelihood per target token (per row for classes), and the classes that were predicted."""

    mean: float
    targets: int
    predicted: list[int] = field(default_factory=list)


def target_count(labels: Tensor, task: str) -> int:
    """How many predictions the model's own mean loss is over."""
    if task == "classification":
        return labels.shape[0]
    return int(((labels if task == "seq2seq" else labels[:, 1:]) != IGNORE).sum())


@torch.no_grad()
def dataset_loss(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    task: str,
    device: torch.device,
    after_batch: Callable[[int], Any] = lambda done: None,
) -> Loss:
    """Evaluate; the model's training mode is put back. `after_batch` is told how many batches are done."""
    was_training = model.training
    model.eval()
    total, count, predicted = 0.0, 0, []
    try:
        for done, batch in enumerate(batches, 1):
            number = target_count(batch["labels"], task)
            output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
            total += float(output.loss) * number
            count += number
            if task == "classification":
                predicted += output.logits.argmax(-1).tolist()
            after_batch(done)
    finally:
        model.train(was_training)
    return Loss(total / max(count, 1), count, predicted)
