"""A model folder, from its config alone: layers that can be adapted, usual targets, attentions. No weights are read."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltatune.bases import as_map
from deltatune.errors import FormatError, PeftError
from deltatune.registry import METHODS
from deltatune.targets import walk

if TYPE_CHECKING:
    from deltatune.prompts.probe import Survey

_SMALL = 200_000_000  # parameters: a model that is filled with random values where empty ones do not get through


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one kind whose paths differ in numbers only; `shape` is (out, in) of the weight."""

    name: str
    kind: str
    shape: tuple[int, ...]
    count: int
    parameters: int


@dataclass(frozen=True)
class SiteFacts:
    """An attention that a prefix can go to; `shape` is key heads, key dim, value heads, value dim."""

    name: str
    kind: str
    shape: list[int]
    calls: int
    way: str  # "interface": transformers' attention interface, "own code": followed through the module's own code


@dataclass(frozen=True)
class UnreachedFacts:
    """An attention that no prefix can be added to; where `partly`, another part of it is among the sites."""

    name: str
    kind: str
    class_name: str
    partly: bool


@dataclass(frozen=True)
class ModelFacts:
    folder: str
    model_type: str
    class_name: str
    parameters: int
    layers: list[LayerGroup]
    defaults: dict[str, Any]  # method -> target_modules it takes when the user names none
    sites: list[SiteFacts]
    unreached: list[UnreachedFacts]
    sites_note: str | None  # why nothing is known of the attentions


def inspect_model(name_or_path: str | Path) -> ModelFacts:
    """Build the model that a folder's or hub repository's config describes, without weights, and look at it.

    Raises:
        FormatError: There is no config that transformers can read.
    """
    model, kind = _built(str(name_or_path), "meta")
    defaults = {}
    for method in METHODS.values():
        if method.default_targets is not None:
            defaults[method.name.upper()] = _plain(method.usual_targets(kind))
    sites, unreached, note = _attentions(model, str(name_or_path))
    return ModelFacts(
        folder=str(name_or_path),
        model_type=kind,
        class_name=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=_layers(model),
        defaults=defaults,
        sites=sites,
        unreached=unreached,
        sites_note=note,
    )


def _built(name: str, device: str) -> tuple[nn.Module, str]:
    import transformers

    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise FormatError(
            f"{name} has neither adapter_config.json nor config.json; give an adapter folder or a model folder",
            path=name,
        )
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise FormatError(f"{name} does not exist; give an adapter folder or a model folder", path=name)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        wanted = (getattr(config, "architectures", None) or [None])[0]
        cls = getattr(transformers, wanted, None) if wanted else None
        with torch.device(device):
            model = cls._from_config(config) if cls is not None else transformers.AutoModel.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FormatError(f"{name}: its config cannot be read: {reason}", path=name) from error
    return model.eval(), config.model_type


def _layers(model: nn.Module) -> list[LayerGroup]:
    found: dict[tuple[str, str, tuple[int, ...]], list[int]] = defaultdict(list)
    for path, module in walk(model):
        layer = as_map(module)
        if layer is not None:
            name = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)
            weight: Any = module.weight
            found[name, type(module).__name__, tuple(weight.shape)].append(weight.numel())
    return [LayerGroup(*key, len(sizes), sum(sizes)) for key, sizes in found.items()]


def _attentions(model: nn.Module, name: str) -> tuple[list[SiteFacts], list[UnreachedFacts], str | None]:
    found = _surveyed(model)
    if found is None and sum(parameter.numel() for parameter in model.parameters()) <= _SMALL:
        found = _surveyed(_built(name, "cpu")[0])
    if found is None:
        return [], [], "the attentions could not be found without the model's weights"
    sites = [
        SiteFacts(
            site.name, site.kind, list(site.shape), site.calls, "interface" if site.layout is None else "own code"
        )
        for site in found.sites
    ]
    unreached = [UnreachedFacts(each.name, each.kind, each.class_name, each.partly) for each in found.unreached]
    return sites, unreached, None


def _surveyed(model: Any) -> Survey | None:
    from deltatune.prompts.sites import survey

    try:
        return survey(model)
    except PeftError:  # a forward pass without values does not get through every architecture
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return sorted(value) if isinstance(value, (set, frozenset)) else value
