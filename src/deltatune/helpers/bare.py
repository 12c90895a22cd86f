"""The base model inside of whatever a helper is handed."""

from __future__ import annotations

from torch import nn

from deltatune.model import PeftModel
from deltatune.tuner import Tuner


def bare(model: nn.Module) -> nn.Module:
    """The model whose layers are wrapped: of a `PeftModel`, of its `base_model`, or the model itself."""
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, Tuner) else model
