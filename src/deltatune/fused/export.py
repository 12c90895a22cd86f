"""Adapters written with their experts apart, as transformers 4 and vLLM read them: format="per_expert"."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import ConfigError
from deltatune.fused.adapters import ParameterAdapters
from deltatune.fused.apart import CONTAINERS, DOWN, GATE_UP, KNOWN, Names
from deltatune.fused.layer import FusedLayer
from deltatune.inject import adapted_layers
from deltatune.notice import warn

PER_EXPERT = "per_expert"


def names_of(model: nn.Module) -> tuple[Names, dict[str, str]]:
    """What checkpoints of the architecture call the layers of one expert, and mixtures (name now -> name there)."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    model_type = getattr(getattr(model, "config", None), "model_type", None)
    patterns = {part for step in get_checkpoint_conversion_mapping(model_type) or () for part in step.source_patterns}
    leaves = {part.removesuffix(".weight").rpartition(".")[2] for part in patterns if ".experts.*." in part}
    names = next((names for names in KNOWN if {names.gate, names.up, names.down} <= leaves), KNOWN[0])
    return names, {new: old for old, new in CONTAINERS.items() if f".{old}." in patterns}


def split(model: nn.Module, name: str, tensors: Mapping[str, Tensor], root: str) -> dict[str, Tensor]:
    """The tensors of an adapter's file with those of experts apart."""
    names, containers = names_of(model)
    found = dict(tensors)
    for path, adapter in _fused(model, name):
        start = f"{root}{path}."
        own = {start + key for key in adapter.file_tensors()}
        found = {key: tensor for key, tensor in found.items() if key not in own}
        found |= {start + key: tensor for key, tensor in adapter.split_tensors(names, _halved(model, name)).items()}
    for new, old in containers.items():
        found = {key.replace(f".{new}.", f".{old}."): tensor for key, tensor in found.items()}
    return found


def config_values(model: nn.Module, name: str, values: dict[str, Any]) -> dict[str, Any]:
    """The config that describes them."""
    names, _ = names_of(model)
    layers = {GATE_UP: (names.gate, names.up), DOWN: (names.down,)}
    parts: list[tuple[str, Any]] = [
        (key, part) for _, adapter in _fused(model, name) for key, part in adapter.each.items()
    ]
    share = 2 if _halved(model, name) else 1
    ranks, alphas = {}, {}
    for key, part in parts:
        by = share if key == GATE_UP else 1
        rank, alpha = part.r // by, part.lora_alpha / (math.sqrt(by) if part.use_rslora else by)
        for layer in layers[key]:
            if (ranks.setdefault(layer, rank), alphas.setdefault(layer, alpha)) != (rank, alpha):
                raise ConfigError(
                    f"format={PER_EXPERT!r}: ranks of {layer} differ between layers", field="rank_pattern"
                )
    kept = [key for key in values["target_parameters"] or () if key.rpartition(".")[2] not in layers]
    kept = [key for key in kept if not key.endswith(".weight")]  # routers, which are layers there
    routers = {key.removesuffix(".weight") for key in set(values["target_parameters"] or ()) if key.endswith(".weight")}
    modules = {*(values["target_modules"] or ()), *routers, *ranks}
    changed = {
        "target_parameters": kept or None,
        "target_modules": sorted(modules),
        "rank_pattern": _pattern(values["rank_pattern"], ranks, values["r"]),
        "alpha_pattern": _pattern(values["alpha_pattern"], alphas, values["lora_alpha"]),
    }
    if changed["rank_pattern"] or changed["alpha_pattern"]:
        warn(
            f"format={PER_EXPERT!r}: layers have ranks or alphas of their own, which older vLLM does not read: it "
            "scales every layer by lora_alpha / r of the whole adapter"
        )
    return {**values, **changed}


def _pattern(given: dict[str, Any], found: dict[str, Any], usual: Any) -> dict[str, Any]:
    """Without what named parameters, with what is not the adapter's usual value."""
    kept = {key: value for key, value in given.items() if not re.search(f"{GATE_UP}$|experts.*{DOWN}$", key)}
    return {**kept, **{rf".*experts\.\d+\.{layer}": value for layer, value in found.items() if value != usual}}


def _fused(model: nn.Module, name: str) -> Iterator[tuple[str, ParameterAdapters]]:
    for path, layer in adapted_layers(model):
        if isinstance(layer, FusedLayer) and name in layer.adapters:
            adapter = layer.adapters[name]
            if isinstance(adapter, ParameterAdapters) and adapter.each.keys() <= {GATE_UP, DOWN}:
                yield path, adapter


def _halved(model: nn.Module, name: str) -> bool:
    """Whether gate and up have halves of the rank to themselves everywhere, as those of adapters that were apart."""
    joint = [(adapter, adapter.each[GATE_UP]) for _, adapter in _fused(model, name) if GATE_UP in adapter.each]
    return bool(joint) and all(_is_halved(part, adapter.interleaved) for adapter, part in joint)


def _is_halved(part: Any, interleaved: bool) -> bool:
    if part.r % 2:
        return False
    B, half = part.B, part.r // 2
    gate, up = (B[:, ::2], B[:, 1::2]) if interleaved else B.chunk(2, 1)
    return not torch.any(gate[..., half:]) and not torch.any(up[..., :half])
