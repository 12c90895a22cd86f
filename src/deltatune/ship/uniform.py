"""Any adapter that a weight can hold as the LoRA that every program reads: one rank, scaling one, a list of targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltatune.combine.convert import convert_to_lora
from deltatune.lora.config import LoraConfig
from deltatune.model import PeftModel
from deltatune.state_dict import ROOT

EXACT = 1e-6  # of a layer's change: what a conversion may lose that is asked for no rank
A, B = ".lora_A.weight", ".lora_B.weight"


def uniform(model: PeftModel, together: tuple[str, ...] = ()) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and tensors, by the keys of a file; lower ranks are filled up with zeros.

    Args:
        together: Layers that a program reads together only: where one of them is adapted, the others of the same block
            get factors of zero.
    """
    name = model.active_adapters[0]
    config, tensors = convert_to_lora(model, None, name, max_error=EXACT)
    tensors |= _beside(model.get_base_model(), tensors, together)
    rank = max([tensor.shape[0] for key, tensor in tensors.items() if key.endswith((A, ".lora_embedding_A"))])
    tensors = {key: _filled(key, tensor, rank) for key, tensor in tensors.items()}
    values = {**config.to_dict(), "r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}
    leaves = {key.removesuffix(A).rpartition(".")[2] for key in tensors if key.endswith(A)}
    if not isinstance(values["target_modules"], str) and together:
        values["target_modules"] = sorted({*values["target_modules"], *leaves})
    return LoraConfig(**values), tensors


def _filled(key: str, tensor: Tensor, rank: int) -> Tensor:
    """Zeros at the end of the axis of the rank."""
    axis = {A: 0, ".lora_embedding_A": 0, B: 1, ".lora_embedding_B": 1}
    for ending, which in axis.items():
        if key.endswith(ending) and tensor.shape[which] < rank:
            shape = list(tensor.shape)
            shape[which] = rank - shape[which]
            return torch.cat([tensor, tensor.new_zeros(shape)], which)
    return tensor


def _beside(base: Any, tensors: dict[str, Tensor], together: tuple[str, ...]) -> dict[str, Tensor]:
    found = {}
    for key, down in tensors.items():
        parent, _, leaf = key.removeprefix(ROOT).removesuffix(A).rpartition(".")
        if not key.endswith(A) or leaf not in together:
            continue
        for other in together:
            path = f"{parent}.{other}"
            if f"{ROOT}{path}{A}" in tensors:
                continue
            layer: Any = base.get_submodule(path)
            found[f"{ROOT}{path}{A}"] = down.new_zeros(1, layer.in_features)
            found[f"{ROOT}{path}{B}"] = down.new_zeros(layer.out_features, 1)
    return found
