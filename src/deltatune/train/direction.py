"""Whether a model writes on from left to right, which a causal task takes for granted."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltatune.errors import ConfigError

CAUSAL = ("ForCausalLM", "LMHeadModel")  # how transformers names classes that are made for it


def check_direction(model: nn.Module, name: str) -> tuple[str, ...]:
    """Refuse a model in which tokens see those after them: its loss would fall by reading the answer.

    Files of a class that is made for the task are believed. Others are tried: does another last token change what is
    predicted at the first one?

    Returns:
        What to tell: that of an encoder-decoder the decoder alone is used.

    Raises:
        ConfigError: It looks ahead.
    """
    config: Any = model.config
    made_for = getattr(config, "architectures", None) or ()
    if any(str(one).endswith(CAUSAL) for one in made_for):
        return ()
    if any(str(one).endswith("ForConditionalGeneration") for one in made_for):
        return (f"{name} is an encoder-decoder, of which its decoder alone is used; task: seq2seq takes both",)
    device = next(model.parameters()).device
    rows = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        first, second = model(input_ids=rows).logits[:, 0].float()
    model.train(was_training)
    if not torch.allclose(first, second, rtol=1e-4, atol=1e-5):
        raise ConfigError(
            f"{name} ({type(model).__name__}) is no causal model: its tokens see those after them, so that it would "
            "learn to copy the answer it is given; use a decoder, or this model for task: classification, "
            "token_classification or question_answering",
            field="model_name_or_path",
            found=name,
        )
    return ()
