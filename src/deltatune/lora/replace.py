"""`replace_lora_weights_loftq`: LoftQ on a base that is quantised already, from the file of its unquantised weights.

s B A = the best answer of rank r to W - Q.   https://arxiv.org/abs/2310.08659
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltatune import inject
from deltatune.adapter import LinearMap
from deltatune.bases.packed import PackedLinear
from deltatune.errors import MismatchError, StateError
from deltatune.lora.checkpoint import Checkpoint
from deltatune.lora.starts.start import balanced


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
) -> None:
    """Set the factors of every quantised layer to what quantising lost of its weight.

    Args:
        peft_model: A model with a LoRA adapter on quantised linear layers.
        model_path: The safetensors file of the unquantised model, or its folder; by default the model's own.
        adapter_name: The adapter.
        callback: (model, path of a layer) -> whether the new factors stay; called after each layer.

    Raises:
        StateError: No layer of the adapter is quantised.
        FormatError: There is no such file.
        MismatchError: It has no such weight, or one of another shape.
    """
    layers = {path: layer for path, layer in inject.adapted_layers(peft_model.get_base_model())
              if adapter_name in layer.adapters and isinstance(layer.as_map(), PackedLinear)}  # fmt: skip
    if not layers:
        raise StateError(
            f"replace_lora_weights_loftq: adapter {adapter_name!r} is on no quantised layer; of an unquantised base "
            'start with init_lora_weights="loftq"',
            field="adapter_name",
            found=adapter_name,
        )
    checkpoint = Checkpoint.of(peft_model.get_base_model(), model_path)
    weights = {path: _checked(checkpoint, layer, path) for path, layer in layers.items()}
    for path, layer in layers.items():
        adapter: Any = layer.adapters[adapter_name]
        before = [factor.weight.detach().clone() for factor in (adapter.lora_A, adapter.lora_B)]
        _put(adapter, *_answer(checkpoint.tensor(weights[path]), layer.as_map(), adapter))
        if callback is not None and not callback(peft_model, path):
            _put(adapter, *before)


def _checked(checkpoint: Checkpoint, layer: Any, path: str) -> str:
    key, (out, columns) = checkpoint.key(f"{path}.weight"), (layer.as_map().out_features, layer.as_map().in_features)
    if checkpoint.shape(key) != (out, columns):
        raise MismatchError(
            f"{checkpoint.place}: {key} has shape {checkpoint.shape(key)}, the layer {(out, columns)}; name the file "
            "of the model that was quantised",
            path=str(checkpoint.place),
            key=key,
            found=checkpoint.shape(key),
            expected=(out, columns),
        )
    return key


def _answer(weight: Tensor, base: LinearMap, adapter: Any) -> tuple[Tensor, Tensor]:
    Q = base.weight.float()
    U, S, Vh = torch.linalg.svd(weight.to(Q.device).float() - Q, full_matrices=False)
    return balanced(U[:, : adapter.r], S[: adapter.r], Vh[: adapter.r], adapter.scaling)


def _put(adapter: Any, A: Tensor, B: Tensor) -> None:
    adapter.lora_A.weight.copy_(A)
    adapter.lora_B.weight.copy_(B)
