"""Bases in tensor parallel: what can be adapted there, and what all processes have to agree on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from deltatune.bases import as_map
from deltatune.bases.sliced import SlicedLinear, is_sliced
from deltatune.errors import StateError, TargetError
from deltatune.storage.fingerprint import keep_fingerprint


def in_slices(model: nn.Module) -> bool:
    """Whether transformers has shared out a model's layers among processes (`tp_plan`)."""
    size = vars(model).get("_tp_size")
    return isinstance(size, int) and size > 1


def refuse_prompt(model: nn.Module, name: str) -> None:
    """
    Raises:
        StateError: The model is in tensor parallel, and each process has some of the heads a prefix is for.
    """
    if in_slices(model):
        raise StateError(
            f"{type(model).__name__} is in tensor parallel (tp_plan), where each process has some of the heads and "
            f"{name} is trained for all of them; adapt its linear layers (LoRA, IA3, ...), or load it without tp_plan",
            field="tp_plan",
            found=name,
        )


def check_slices(model: nn.Module, layers: Mapping[str, nn.Module], saved: Mapping[str, nn.Module]) -> None:
    """Before a model in tensor parallel is adapted; does nothing to others.

    Args:
        layers: What gets adapters, by path.
        saved: What is to be trained whole, by path.

    Raises:
        TargetError: A layer is in slices of a kind that is not read here (embeddings, packed or fused weights).
        StateError: The processes draw different random numbers, so that each would begin with an adapter of its own.
    """
    if not in_slices(model):
        return
    for path, layer in [*layers.items(), *saved.items()]:
        whole = not any(is_sliced(parameter) for parameter in layer.parameters())
        if not whole and (path in saved or not isinstance(as_map(layer), SlicedLinear)):
            raise TargetError(
                f"target {path!r} is a {type(layer).__name__} in tensor parallel, of which this process has a part; "
                "only linear layers that are cut colwise or rowwise are adapted there, and none is trained whole",
                field="target_modules",
                path=path,
            )
    mesh: Any = next(parameter.device_mesh for parameter in model.parameters() if is_sliced(parameter))  # type: ignore[attr-defined]
    if not _same_everywhere(mesh):
        raise StateError(
            f"{type(model).__name__} is in tensor parallel, and the processes that share it draw different random "
            "numbers, so that their adapters would differ; call torch.manual_seed with the same number in all of them",
            field="seed",
        )
    keep_fingerprint(model)  # all processes are here now; saving is often the first one's alone


def _same_everywhere(mesh: Any) -> bool:
    """Whether the generators of a mesh's processes stand at the same place."""
    import torch.distributed as dist

    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if mesh.device_type == "cuda" else [])]
    state = hashlib.sha256(torch.cat(states).numpy().tobytes()).digest()[:7]
    own = torch.tensor([int.from_bytes(state, "big")], device=mesh.device_type)
    found = [torch.empty_like(own) for _ in range(mesh.size())]
    dist.all_gather(found, own, group=mesh.get_group())
    return all(torch.equal(one, own) for one in found)
