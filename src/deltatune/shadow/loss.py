"""The shadow's own loss: what a head says to s_0, before any block. It makes the shadow a model of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def task_loss(
    model: Any, head: nn.Module | None, first: Tensor, labels: Tensor, attention_mask: Tensor | None
) -> Tensor | None:
    """Loss of a classifier's own head, or of the language model's, on s_0 (B, T, d); None where there is no head."""
    if head is not None:
        return classification(head(last_token(first, attention_mask)), labels)
    head = model.get_output_embeddings()
    if head is None:
        return None
    logits = head(first.to(next(head.parameters()).dtype)).float()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def last_token(states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, T, d) -> (B, d): at the last token that is no padding, on whichever side the padding is."""
    if attention_mask is None:
        return states[:, -1]
    last = (attention_mask.ne(0) * torch.arange(attention_mask.shape[-1], device=states.device)).argmax(-1)
    return states[torch.arange(len(states), device=states.device), last]


def classification(logits: Tensor, labels: Tensor) -> Tensor:
    """As transformers: regression with one output, several classes or one by the labels' type."""
    if logits.shape[-1] == 1:
        return functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).flatten())
    if labels.is_floating_point():
        return functional.binary_cross_entropy_with_logits(logits, labels)
    return functional.cross_entropy(logits, labels.flatten())
