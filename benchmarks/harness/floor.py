"""The floor: what a training step costs through the frozen model alone. And the step that stands beside it.

The same work on all sides: the model's forward pass with the same loss, and its backward pass down to the output of the
embeddings, which is as far as the gradient of the lowest adapter has to come. No gradient of a weight of the base is
computed anywhere. The embedded ids are handed over as a leaf instead of through the hook by which gradient
checkpointing makes embeddings require gradients: such a hook stays on the model, and every later floor would be one
that includes it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def floor(model: Any, ids: Tensor) -> None:
    """Forward and backward through a causal model all of whose parameters are frozen."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=ids).loss.backward()


def step(model: Any, ids: Tensor, **options: Any) -> None:
    """Forward and backward of an adapted model."""
    model.zero_grad()
    model(input_ids=ids, labels=ids, **options).loss.backward()
