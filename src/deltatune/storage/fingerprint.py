"""What base model an adapter was made for: a short digest of names, shapes and a sample of values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.bases import as_map
from deltatune.bases.packed import PackedLinear
from deltatune.copies import TrainedCopies
from deltatune.layer import AdaptedLayer
from deltatune.replication import Replicas
from deltatune.shared import SharedModules

SAMPLES = 8  # values taken from each parameter


def fingerprint(model: nn.Module, without: Iterable[str] = ()) -> dict[str, Any]:
    """Digest of a base model, the same with and without adapters on it.

    Args:
        without: Names of modules that are trained whole, whose values are not the base's (a fresh classifier head).
    """
    structure, values = hashlib.sha256(), hashlib.sha256()
    dtypes, count, skipped, seen = set(), 0, set(without), set()
    packed = dict(_packed_weights(model))
    plain = {name: tensor for name, tensor in base_parameters(model) if name not in packed}
    for name in sorted({*plain, *packed}):
        if skipped & set(name.split(".")):
            continue
        if name in packed:  # counts as the matrix it stands for, so that an adapter crosses over from base to base
            shape, kind = packed[name]
            structure.update(f"{name} {shape}\n".encode())
            count += prod(shape)
            dtypes.add(kind)
            continue
        tensor = plain[name]
        structure.update(f"{name} {tuple(tensor.shape)}\n".encode())
        count += tensor.numel() if id(tensor) not in seen else 0  # tied parameters once
        seen.add(id(tensor))
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
        if not tensor.is_meta and tensor.numel():
            values.update(_sample(tensor))
        elif tensor.is_meta:
            values = hashlib.sha256()
    return {
        "class": type(model).__name__,
        "parameters": count,
        "structure": structure.hexdigest()[:32],
        "values": values.hexdigest()[:32],
        "dtypes": sorted(dtypes),
    }


def difference(made_for: dict[str, Any], present: dict[str, Any]) -> str | None:
    """How two bases differ, in words; None when they are the same. Values compare between equal dtypes only."""
    if made_for["structure"] != present["structure"]:
        return (
            f"{made_for['class']} of {made_for['parameters']:,} parameters, this is "
            f"{present['class']} of {present['parameters']:,}"
        )
    if made_for["dtypes"] == present["dtypes"] and made_for["values"] != present["values"]:
        return f"{made_for['class']} of the same shape with other weights"
    return None


def base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the parameters of the bare model, adapters looked through."""
    yield from _walk(model, "")


def _packed_weights(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, tuple[tuple[int, int], str]]]:
    """Name, shape of the matrix, and kind of packing of the quantised layers."""
    for name, child in module._modules.items():
        if isinstance(child, AdaptedLayer):
            child = child.base_layer
        elif isinstance(child, TrainedCopies):
            child = child.original_module
        elif isinstance(child, Replicas):
            child = child.original
        if child is None or isinstance(child, SharedModules):
            continue
        layer = as_map(child)
        if isinstance(layer, PackedLinear):
            yield f"{prefix}{name}.weight", ((layer.out_features, layer.in_features), type(layer).__name__)
        yield from _packed_weights(child, f"{prefix}{name}.")


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    merged: Mapping[str, Tensor | None] = {}
    if isinstance(module, AdaptedLayer):
        stash, keeps, module = module.stash, module.as_map().keeps, module.base_layer
        if stash is not None:
            merged = stash.by_name(keeps)
    elif isinstance(module, TrainedCopies):
        module = module.original_module
    elif isinstance(module, Replicas):
        module = module.original
    for name, parameter in module._parameters.items():
        if parameter is not None:
            kept = merged.get(name)
            yield prefix + name, parameter if kept is None else kept
    for name, child in module._modules.items():
        if child is not None and not isinstance(child, SharedModules):
            yield from _walk(child, f"{prefix}{name}.")


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().flatten()
    step = max(flat.numel() // SAMPLES, 1)
    picked = flat[::step][:SAMPLES]
    picked = picked.float() if picked.is_floating_point() else picked
    return bytes(picked.cpu().contiguous().view(torch.uint8).tolist())
