"""How EVA reads a model's inputs: the functions that `get_eva_state_dict` takes, as they are by default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltatune.errors import DataError


def forward_fn_dict(model: Any, inputs: Any) -> Any:
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> Tensor:
    """The places (n, 2), row and position, of the tokens that count: not padded, and with a label if that is asked."""
    if not isinstance(model_input, Mapping):
        raise DataError(
            f"EVA: a batch is a {type(model_input).__name__}, expected a dict with input_ids; for other inputs pass "
            "prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None and a forward_fn",
            field="dataloader",
            found=type(model_input).__name__,
            expected="dict",
        )
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    labels = model_input.get("labels")
    if peft_config.eva_config.use_label_mask and labels is not None and labels.shape == mask.shape:  # one per token
        mask = mask & (labels != peft_config.eva_config.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """The rows (n, in) of a layer's input (B, T, in) at these places; all of one without tokens (pooled)."""
    x = first(layer_input, layer_name)
    return x if x.ndim < 3 else x[model_input.T.unbind()]


def every_row(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    x = first(layer_input, layer_name)
    return x.flatten(0, -2) if x.ndim > 2 else x


def first(layer_input: Any, layer_name: str) -> Tensor:
    found = layer_input[0] if isinstance(layer_input, (tuple, list)) and layer_input else layer_input
    if not isinstance(found, Tensor):
        raise DataError(
            f"EVA: {layer_name} takes a {type(found).__name__}; pass a prepare_layer_inputs_fn for it",
            field="prepare_layer_inputs_fn",
            key=layer_name,
            found=type(found).__name__,
            expected="Tensor",
        )
    return found


def moved(inputs: Any, device: torch.device) -> Any:
    """A batch on a device; what is no tensor stays."""
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {name: moved(part, device) for name, part in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(moved(part, device) for part in inputs)
    return inputs


def gathered(x: Tensor, everywhere: bool) -> Tensor:
    """The rows of all processes, where there are several."""
    dist = torch.distributed
    if not (everywhere and dist.is_available() and dist.is_initialized()):
        return x
    sizes = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
    longest = max(int(size) for size in sizes)
    padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes)])
