"""Whether a model's loss comes out the same in chunks: it is run once either way, on a small batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltatune.errors import StateError
from deltatune.helpers.bare import bare
from deltatune.loss.stage import STAGE, LossStage, chunk_loss
from deltatune.prompts.example import example_inputs, two_rows

CLOSE = {torch.float32: 1e-4, torch.float64: 1e-6}  # of losses; half precision rounds what models do to logits
HALF = 2e-2


def why_not(model: nn.Module) -> str | None:
    """Why `chunk_loss` would not serve this model; None where it does. The model is left as it was.

    Nothing is concluded from names: what counts is that the loss asks nothing else of the logits, and is the same.
    """
    base: Any = bare(model)
    training, there = base.training, STAGE in vars(base)
    base.eval()
    try:
        with torch.no_grad():
            return _compared(base, chunk_loss(base))
    except StateError as error:  # no head
        return str(error)
    except Exception as error:  # it takes other inputs
        told = (str(error).splitlines() or [""])[0]
        return f"a small batch with labels could not be run ({type(error).__name__}: {told})"
    finally:
        base.train(training)
        if not there and STAGE in vars(base):
            chunk_loss(base).remove()


def _compared(base: Any, stage: LossStage) -> str | None:
    inputs = two_rows(next(example_inputs(base)))
    inputs["labels"] = inputs.pop("decoder_input_ids", inputs["input_ids"]).clone()
    losses = []
    for stage.enabled in (False, True):
        losses.append(float(base(**inputs).loss))
    if stage.whole is not None:
        return stage.whole
    own, found = losses
    if abs(found - own) <= CLOSE.get(base.dtype, HALF) * max(1.0, abs(own)):
        return None
    return f"the loss of a small batch is {found:.6g} in chunks, and {own:.6g} by the model"
