"""`MontecloraTrainerMixin`: a name of PEFT, for trainers whose loss lacks what MonteCLoRA adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from deltatune.tuner import Tuner


class MontecloraTrainerMixin:
    """To be named before transformers' Trainer among the bases of a class.

    A training pass adds the penalty of its adapters to `outputs.loss` by itself. This adds it where the trainer makes a
    loss of its own from the logits instead (label smoothing, `compute_loss_func`), and never a second time.
    """

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)  # type: ignore[misc]
        if model.training and isinstance(outputs, Mapping) and outputs.get("loss") is None:
            for tuner in (module for module in model.modules() if isinstance(module, Tuner)):
                penalty = tuner.penalty()
                loss = loss if penalty is None else loss + penalty.to(loss)
        return (loss, outputs) if return_outputs else loss
