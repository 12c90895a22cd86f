"""What base model an adapter was made for: a short digest of names, shapes and a sample of values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.bases import as_map
from deltatune.bases.packed import PackedLinear
from deltatune.bases.sliced import is_sliced
from deltatune.copies import TrainedCopies
from deltatune.layer import AdaptedLayer
from deltatune.replication import Replicas
from deltatune.shared import SharedModules

SAMPLES = 8  # values taken from each parameter
UNKNOWN = hashlib.sha256().hexdigest()[:32]  # values of a base that is not all in memory
KEPT = "_deltatune_fingerprint"  # key in the __dict__ of a base whose values were taken before


@dataclass(frozen=True)
class Part:
    """What counts of one tensor of a base. `sample` is None where it has no numbers, empty for packed weights."""

    name: str
    shape: tuple[int, ...]
    kind: str
    owner: int  # equal for tied parameters; 0 for packed weights, which are never tied
    sample: bytes | None


def fingerprint(model: nn.Module, without: Iterable[str] = ()) -> dict[str, Any]:
    """Digest of a base model, the same with and without adapters on it.

    Args:
        without: Names of modules that are trained whole, whose values are not the base's (a fresh classifier head).
    """
    structure, values = hashlib.sha256(), hashlib.sha256()
    dtypes, count, skipped, seen, known = set(), 0, set(without), set(), True
    name, parts = vars(model).get(KEPT) or _facts(model)
    for part in parts:
        if skipped & set(part.name.split(".")):
            continue
        structure.update(f"{part.name} {part.shape}\n".encode())
        count += prod(part.shape) if not part.owner or part.owner not in seen else 0  # tied parameters once
        seen.add(part.owner)
        dtypes.add(part.kind)
        known = known and part.sample is not None
        values.update(part.sample or b"")
    return {
        "class": name,
        "parameters": count,
        "structure": structure.hexdigest()[:32],
        "values": values.hexdigest()[:32] if known else UNKNOWN,
        "dtypes": sorted(dtypes),
    }


def keep_fingerprint(model: nn.Module) -> None:
    """Take the values now, for good: before the base is sharded, after which no process can read them by itself."""
    vars(model)[KEPT] = _facts(model)


def _facts(model: nn.Module) -> tuple[str, list[Part]]:
    packed = dict(packed_weights(model))
    plain = {name: tensor for name, tensor in base_parameters(model) if name not in packed}
    found = []
    for name in sorted({*plain, *packed}):
        if name in packed:  # counts as the matrix it stands for, so that an adapter crosses over from base to base
            found.append(Part(name, *packed[name], 0, b""))
            continue
        tensor = plain[name]
        kind = str(tensor.dtype).removeprefix("torch.")
        found.append(Part(name, tuple(tensor.shape), kind, id(tensor), None if tensor.is_meta else _sample(tensor)))
    return type(model).__name__, found


def difference(made_for: dict[str, Any], present: dict[str, Any]) -> str | None:
    """How two bases differ, in words; None when they are the same. Values compare between equal dtypes only."""
    if made_for["structure"] != present["structure"]:
        return (
            f"{made_for['class']} of {made_for['parameters']:,} parameters, this is "
            f"{present['class']} of {present['parameters']:,}"
        )
    values = {made_for["values"], present["values"]}
    if made_for["dtypes"] == present["dtypes"] and len(values) > 1 and UNKNOWN not in values:
        return f"{made_for['class']} of the same shape with other weights"
    return None


def base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the parameters of the bare model, adapters looked through."""
    yield from _walk(model, "")


def packed_weights(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, tuple[tuple[int, int], str]]]:
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
        layer = None if _is_plain(child) else as_map(child)
        if isinstance(layer, PackedLinear):
            yield f"{prefix}{name}.weight", ((layer.out_features, layer.in_features), type(layer).__name__)
        if child._modules:
            yield from packed_weights(child, f"{prefix}{name}.")


def _is_plain(module: nn.Module) -> bool:
    """Whether its weight is certainly not packed: nearly every layer, of which each load asks all."""
    return type(module) is nn.Linear and type(module._parameters.get("weight")) is nn.Parameter


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    merged: Mapping[str, Tensor | None] = {}
    if isinstance(module, AdaptedLayer):
        if module.stash is not None:
            merged = module.stash.by_name(module.as_map().keeps)
        module = module.base_layer
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
    if not tensor.numel():
        return b""
    if is_sliced(tensor):  # gathered: all processes have to be here
        tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    flat = tensor.detach().flatten()
    step = max(flat.numel() // SAMPLES, 1)
    picked = flat[::step][:SAMPLES]
    picked = picked.float() if picked.is_floating_point() else picked
    return bytes(picked.cpu().contiguous().view(torch.uint8).tolist())
