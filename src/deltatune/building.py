"""An adapter for every layer that a config targets: built and checked beside the model, of which nothing changes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltatune import biases, empty, targets, tying
from deltatune.adapter import Adapter, LinearMap, Method, Stored
from deltatune.bases.block import Block, width_of
from deltatune.bases.parameter import offloading
from deltatune.config import PeftConfig
from deltatune.copies import TrainedCopies
from deltatune.errors import ConfigError, StateError, TargetError
from deltatune.fused import graft as fused
from deltatune.layer import AdaptedLayer
from deltatune.registry import METHODS
from deltatune.suggest import nearest


@dataclass
class Built:
    """What one adapter name is to be on a model.

    Attributes:
        config: The given one, with its targets found.
        adapters: By the id of the module that each is for.
        shared: What the adapters of all layers share.
        saved: Path -> module of what is trained whole.
    """

    config: Any
    adapters: dict[int, Adapter]
    shared: Stored | None
    saved: dict[str, nn.Module]


def build(model: nn.Module, config: PeftConfig, name: str, autocast: bool) -> Built:
    """
    Args:
        autocast: Adapters of half-precision layers are in float32.

    Raises:
        PeftError: The config does not fit the model.
    """
    method = METHODS[config.peft_type]  # type: ignore[index]
    resolved: Any = copy.copy(config)
    fused.convert(model, resolved)
    if getattr(resolved, "ensure_weight_tying", False):
        tying.retarget(model, resolved)
    saved = find_saved(model, resolved)
    built: dict[int, Adapter] = {}
    shared = None
    if not fused.targets_no_layer(resolved, targets.model_type_of(model), method):
        shared = _build_all(model, method, resolved, name, autocast, built)
    if resolved.target_parameters is not None:
        fused.build(model, resolved, name, autocast, built)
    for part, options in resolved.beside():
        _build_all(model, part, options, name, autocast, built)
        _refuse_copied(model, built, saved)
    _build_tied(model, built, saved)
    if (choice := getattr(resolved, "bias", "none")) != "none":
        biases.build(
            _outside(model, saved),
            choice,
            built,
            lambda adapter, module, layer: _place(adapter, module, layer, autocast),
        )
    return Built(resolved, built, shared, saved)


def _build_all(
    model: nn.Module, method: Method, config: Any, name: str, autocast: bool, built: dict[int, Adapter]
) -> Stored | None:
    """An adapter for every layer that a config targets; `built` gets them. Returns what they share."""
    assert method.adapter is not None
    targets.with_defaults(config, model, lambda kind: method.usual_targets(kind, config), method.find_targets)
    found, owners = targets.find(model, config, method.adapter), _owners(model, built)
    for path, module in found.items():
        if id(module) in built:
            raise ConfigError(
                f"{type(config).__name__}: {path} is a target twice, and a layer has one adapter of a name; "
                "take it out of one of the lists, or add a second adapter",
                field="target_modules",
                path=path,
            )
    made, shared = _build(model, method, found, config, name, autocast)
    for module in {id(module): module for module in found.values()}.values():
        sharing = owners.setdefault(id(_stored(module)), [])
        followed = (owner.tied(_map(module), config) for owner in sharing)
        follows = next((adapter for adapter in followed if adapter is not None), None)
        if follows is None:
            sharing.append(made[id(module)])
        built[id(module)] = follows or made[id(module)]
    return shared


def _build(
    model: nn.Module, method: Method, found: dict[str, nn.Module], config: PeftConfig, name: str, autocast: bool
) -> tuple[dict[int, Adapter], Stored | None]:
    """An adapter per layer, by the layer's id, and what they share, all in place and precision of their layers."""
    assert method.adapter is not None
    once = {id(module): path for path, module in reversed(found.items())}  # a layer goes by the first of its paths
    layers = {
        path: _layer(method.adapter, model, module, config, path, name)
        for path, module in found.items()
        if once[id(module)] == path
    }
    made, shared = empty.build(method, layers, config)
    for path, adapter in made.items():
        _place(adapter, found[path], layers[path], autocast)
        if layers[path].only_weight and adapter.mergeable is not True:
            raise TargetError(
                f"target {path!r} is a {type(_holder(found[path])).__name__}, which is adapted through its weight "
                f"alone, and no weight can hold {type(adapter).__name__}: {adapter.mergeable}; target layers around it",
                field="target_modules",
                path=path,
            )
    if shared is not None:
        first = next(iter(layers))
        _place(shared, found[first], layers[first], autocast)
    return {id(found[path]): adapter for path, adapter in made.items()}, shared


def _layer(
    kind: type[Adapter], model: nn.Module, module: nn.Module, config: PeftConfig, path: str, name: str
) -> LinearMap:
    """A target as the map that is adapted.

    Raises:
        PeftError: It is adapted under this name already, or the method does not fit it.
    """
    if isinstance(module, AdaptedLayer):
        if name in module.adapters:
            raise StateError(f"layer {path} has an adapter named {name!r} already", field="adapter_name", found=name)
        if module.merged:
            raise StateError(
                f"layer {path} has merged adapters; call unmerge_adapter() before adding {name!r}",
                field="adapter_name",
                path=path,
                found=name,
                hint="call unmerge_adapter()",
            )
        layer = module.as_map()
    else:
        layer = targets.as_map(module)
    if layer is None or layer.kind == "block":
        layer = Block(_holder(module), width=width_of(model, path))
    if (fits := kind.fits(layer)) is not True:
        raise TargetError(
            f"target {path!r} is a {type(_holder(module)).__name__}, which {kind.__name__} cannot adapt; {fits}",
            field="target_modules",
            path=path,
        )
    rank = getattr(config, config.rank_name, 0) if kind.bounded_r else 0
    longer = max(layer.in_features, layer.out_features)
    if rank and rank > longer:
        raise ConfigError(
            f"{type(config).__name__}: {config.rank_name}={rank} is larger than both sides of {path} "
            f"({layer.out_features}, {layer.in_features}); use at most {min(layer.in_features, layer.out_features)}",
            field=config.rank_name,
            expected=longer,
        )
    return layer


def _build_tied(model: nn.Module, built: dict[int, Adapter], saved: dict[str, nn.Module]) -> None:
    """Adapters for layers that no one targets, but whose weight is that of one whose adapter they have to follow."""
    if not any(adapter.ties for adapter in built.values()):
        return
    owners = _owners(model, built)
    for path, module in targets.walk(model):
        if not _shares(module, owners) or targets.map_of(module) is None or _inside(path, saved):
            continue
        present = built.get(id(module))
        for owner in owners.get(id(_stored(module)), []):
            follows = None if owner is present else owner.tied(_map(module))
            if follows is not None and present is None:
                present = built[id(module)] = follows
            elif follows is not None and type(present) is not type(follows):
                raise ConfigError(
                    f"{path} shares its weight with a layer whose {type(owner).__name__} it has to follow, and is a "
                    f"target of {type(present).__name__} too; take it out of target_modules",
                    field="target_modules",
                    path=path,
                )


def _refuse_copied(model: nn.Module, built: dict[int, Adapter], saved: dict[str, nn.Module]) -> None:
    for path, module in targets.walk(model):
        if id(module) in built and _inside(path, saved):
            raise ConfigError(
                f"modules_to_save: {path} is trained whole and has an adapter too; name it in one of the two",
                field="modules_to_save",
                path=path,
            )


def find_saved(model: nn.Module, config: Any) -> dict[str, nn.Module]:
    """Path -> module for everything that is to be trained whole. Changes nothing."""
    names = config.modules_to_save or []
    if "" in names:  # every path ends with it
        raise TargetError(
            f"modules_to_save={names!r}: '' would train every module of {type(model).__name__} whole; name those that "
            "are meant",
            field="modules_to_save",
            found=names,
            expected="names of modules",
        )
    modules = dict(targets.walk(model))
    # as PEFT: any ending, so that "norm" means "input_layernorm" too; its files hold what it has trained
    found = {path: module for path, module in modules.items() if path.endswith(tuple(names))}
    dead = [name for name in names if not any(path.endswith(name) for path in found)]
    dead = [name for name in dead if name not in targets.HEAD_NAMES]  # PEFT's files name every usual head
    if dead:
        endings = {path.rpartition(".")[2] for path in modules}
        raise TargetError(
            f"modules_to_save: {dead[0]!r} matches no module of {type(model).__name__}; "
            f"the nearest names are {nearest(dead[0], endings, 3) or sorted(endings)[:5]}",
            field="modules_to_save",
            found=dead,
        )
    inner = [path for path in found if any(path.startswith(f"{other}.") for other in found)]
    return {path: module for path, module in found.items() if path not in inner}


def _outside(model: nn.Module, saved: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module, LinearMap | None]]:
    """Path, module and map of what is not trained whole."""
    for path, module in targets.walk(model):
        if not _inside(path, saved) and not isinstance(module, TrainedCopies):
            yield path, module, targets.map_of(module)


def _owners(model: nn.Module, built: dict[int, Adapter]) -> dict[int, list[Adapter]]:
    """The adapters that are built, by the id of the parameter that they change."""
    found: dict[int, list[Adapter]] = {}
    for module in {id(module): module for _, module in targets.walk(model)}.values():
        if id(module) in built:
            found.setdefault(id(_stored(module)), []).append(built[id(module)])
    return found


def _inside(path: str, saved: dict[str, nn.Module]) -> bool:
    return any(f"{path}.".startswith(f"{other}.") for other in saved)


def _shares(module: nn.Module, owners: dict[int, Any]) -> bool:
    """Whether `_stored` may be one of the owned; asking what kind of layer each module is takes far longer."""
    holder = _holder(module)
    return id(holder) in owners or any(id(parameter) in owners for parameter in holder._parameters.values())


def _map(module: nn.Module) -> LinearMap:
    return targets.map_of(module) or Block(_holder(module))


def _stored(module: nn.Module) -> Any:
    """The parameter in which a layer keeps its weight; the layer itself where it is none."""
    layer, holder = targets.map_of(module), _holder(module)
    stored = None if layer is None else holder._parameters.get(layer.keeps[0])
    return holder if stored is None else stored


def _holder(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, AdaptedLayer) else module


def _place(made: Stored, module: nn.Module, layer: LinearMap, autocast: bool) -> None:
    half = layer.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if half and autocast else layer.dtype
    holder = _holder(module)
    device = _device(holder)
    if not _is_in(made, device, dtype):
        made.to(device=None if empty.is_empty(made) else device, dtype=dtype)


def _device(holder: nn.Module) -> torch.device:
    """Where a layer computes; accelerate may keep its parameters elsewhere in between."""
    device = next(itertools.chain(holder.parameters(), holder.buffers())).device
    hooks = (offloading(module) for module in holder.modules()) if device.type == "meta" else ()
    return next((torch.device(hook.execution_device) for hook in hooks if hook is not None), device)


def _is_in(module: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `module.to(device, dtype)` would change nothing."""
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and (tensor.device != device or (tensor.dtype != dtype and tensor.is_floating_point())):
            return False
    return all(child is None or _is_in(child, device, dtype) for child in module._modules.values())
