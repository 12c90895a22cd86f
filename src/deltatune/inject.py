"""Grafting adapters onto a model and taking them off again. A call that fails leaves the model as it was."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from deltatune import biases, calls, empty, replication, targets, tying
from deltatune.adapter import Adapter, LinearMap, Method, Stored
from deltatune.bases.block import Block, width_of
from deltatune.bases.parameter import offloading
from deltatune.config import PeftConfig
from deltatune.copies import TrainedCopies
from deltatune.errors import ConfigError, StateError, TargetError
from deltatune.fused import graft as fused
from deltatune.fused.adapters import ParameterAdapters
from deltatune.fused.layer import FusedLayer
from deltatune.layer import AdaptedLayer
from deltatune.memory import SMALLER, told
from deltatune.registry import METHODS
from deltatune.selection import Selection
from deltatune.shared import SHARED, SharedModules, add_shared, remove_shared, strip_shared
from deltatune.storage.fingerprint import base_parameters
from deltatune.suggest import nearest


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Bare paths and wrappers, each wrapper once."""
    yield from _once(model, AdaptedLayer)


def trained_copies(model: nn.Module) -> Iterator[tuple[str, TrainedCopies]]:
    yield from _once(model, TrainedCopies)


def _once(model: nn.Module, kind: type | tuple[type, ...]) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    for path, module in targets.walk(model):
        if isinstance(module, kind) and id(module) not in seen:
            seen.add(id(module))
            yield path, module


def graft(
    model: nn.Module, config: PeftConfig, name: str, selection: Selection, autocast_adapter_dtype: bool = True
) -> None:
    """Put an adapter of a layer method on every layer the config targets, and copies on `modules_to_save`.

    Everything is built and checked before the first module of the model is replaced.
    """
    config.validate()
    _refuse_slices(model)
    replicated = replication.replicate(model, getattr(config, "layer_replication", None))
    try:
        with told(f"building adapter {name!r}", SMALLER):
            _graft(model, config, name, selection, autocast_adapter_dtype)
    except BaseException:
        if replicated:
            replication.restore(model)
        raise


def _refuse_slices(model: nn.Module) -> None:
    size = getattr(model, "_tp_size", None)
    if isinstance(size, int) and size > 1:
        raise StateError(
            f"{type(model).__name__} is in tensor parallel (tp_plan) over {size} processes, and its layers answer with "
            "a part of the output, to which no whole adapter can be added; load it without tp_plan (deltatune train "
            "has profile: fsdp2 for bases that one device cannot hold)",
            field="tp_plan",
            found=size,
        )


def _graft(model: nn.Module, config: PeftConfig, name: str, selection: Selection, autocast_adapter_dtype: bool) -> None:
    method = METHODS[config.peft_type]  # type: ignore[index]
    resolved: Any = copy.copy(config)
    fused.convert(model, resolved)
    tie = getattr(resolved, "ensure_weight_tying", False)
    if tie:
        tying.retarget(model, resolved)
    saved = find_saved(model, resolved)
    built: dict[int, Adapter] = {}  # by the id of the module that each is for
    shared = None
    if not fused.targets_no_layer(resolved, targets.model_type_of(model), method):
        shared = _build_all(model, method, resolved, name, autocast_adapter_dtype, built)
    if resolved.target_parameters is not None:
        fused.build(model, resolved, name, autocast_adapter_dtype, built)
    for part, options in resolved.beside():
        _build_all(model, part, options, name, autocast_adapter_dtype, built)
        _refuse_copied(model, built, saved)
    _build_tied(model, built, saved)
    if (choice := getattr(resolved, "bias", "none")) != "none":
        biases.build(
            _outside(model, saved),
            choice,
            built,
            lambda adapter, module, layer: _place(adapter, module, layer, autocast_adapter_dtype),
        )
    with _undone_on_error() as undo:
        if shared is not None:
            add_shared(model, name, shared)
            undo.append(lambda: remove_shared(model, name))
        # backwards: parts before what they are in; a layer that has another name too is adapted under both
        wrappers = _wrappers(model, AdaptedLayer)
        for path, module in reversed(list(targets.walk(model))):
            if id(module) not in built:
                continue
            kind = FusedLayer if isinstance(built[id(module)], ParameterAdapters) else AdaptedLayer
            wrapper = _wrap(model, path, module, kind, wrappers, selection, undo)
            if name not in wrapper.adapters:
                wrapper.add(name, built[id(module)])
                undo.append(lambda wrapper=wrapper: wrapper.adapters.__delitem__(name))
        add_copies(model, saved, name, selection, undo, tie)
        calls.follow(model, selection, name, (value for adapter in built.values() for value in adapter.reads))
    vars(config).update({key: value for key, value in vars(resolved).items() if key != "unknown_fields"})


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


def _build_tied(model: nn.Module, built: dict[int, Adapter], saved: dict[str, nn.Module]) -> None:
    """Adapters for layers that no one targets, but whose weight is that of one whose adapter they have to follow."""
    if not any(adapter.ties for adapter in built.values()):
        return
    owners = _owners(model, built)
    for path, module in targets.walk(model):
        if targets.map_of(module) is None or _inside(path, saved):
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


def _refuse_copied(model: nn.Module, built: dict[int, Adapter], saved: dict[str, nn.Module]) -> None:
    for path, module in targets.walk(model):
        if id(module) in built and _inside(path, saved):
            raise ConfigError(
                f"modules_to_save: {path} is trained whole and has an adapter too; name it in one of the two",
                field="modules_to_save",
                path=path,
            )


def _inside(path: str, saved: dict[str, nn.Module]) -> bool:
    return any(f"{path}.".startswith(f"{other}.") for other in saved)


def _map(module: nn.Module) -> LinearMap:
    return targets.map_of(module) or Block(_holder(module))


def _stored(module: nn.Module) -> Any:
    """The parameter in which a layer keeps its weight; the layer itself where it is none."""
    layer, holder = targets.map_of(module), _holder(module)
    stored = None if layer is None else holder._parameters.get(layer.keeps[0])
    return holder if stored is None else stored


def find_saved(model: nn.Module, config: Any) -> dict[str, nn.Module]:
    """Path -> module for everything that is to be trained whole. Changes nothing."""
    names = config.modules_to_save or []
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


def add_copies(
    model: nn.Module,
    saved: dict[str, nn.Module],
    name: str,
    selection: Selection,
    undo: list[Any] | None = None,
    tie: bool = False,
) -> None:
    """Copies for modules to be trained whole; with `tie` those of modules that share tensors share theirs."""
    wrappers = _wrappers(model, TrainedCopies) if saved else {}
    shared: dict[int, Any] = {}
    for path, module in saved.items():
        wrapper = _wrap(model, path, module, TrainedCopies, wrappers, selection, undo)
        if name not in wrapper.modules_to_save:
            wrapper.add(name, shared if tie else {})


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
            raise StateError(f"layer {path} has merged adapters; call unmerge_adapter() before adding {name!r}")
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


def _wrappers(model: nn.Module, kind: type) -> dict[int, Any]:
    """The wrappers of a kind, by the id of what each stands for."""
    return {id(_inner(wrapper)): wrapper for _, wrapper in _once(model, kind)}


def _wrap(
    model: nn.Module,
    path: str,
    module: nn.Module,
    kind: Any,
    wrappers: dict[int, Any],
    selection: Selection,
    undo: list[Any] | None,
) -> Any:
    """The wrapper at a path, put there if there is none; a module with several paths gets one wrapper for all."""
    parent, _, child = path.rpartition(".")
    holder = resolve(model, parent)
    present = holder._modules[child]
    if isinstance(present, kind):
        return present
    wrapper = wrappers[id(module)] = wrappers.get(id(module)) or kind(module, selection)
    holder._modules[child] = wrapper
    if undo is not None:
        undo.append(lambda: holder._modules.__setitem__(child, present))
    return wrapper


def resolve(model: nn.Module, path: str) -> nn.Module:
    """The module at a bare path; copies and blocks are passed through to their original."""
    for part in path.split(".") if path else []:
        child = model._modules[part]
        assert child is not None
        if isinstance(child, TrainedCopies):
            child = child.original_module
        model = child.base_layer if isinstance(child, AdaptedLayer) and child.is_block else child
    return model


def _inner(wrapper: AdaptedLayer | TrainedCopies) -> nn.Module:
    return wrapper.base_layer if isinstance(wrapper, AdaptedLayer) else wrapper.original_module


def remove(model: nn.Module, name: str) -> None:
    """Take one adapter off; a wrapper left without adapters is taken off too."""
    remove_shared(model, name)
    calls.forget(model, name)
    for path, module in reversed(list(targets.walk(model))):
        if isinstance(module, AdaptedLayer):
            module.drop(name)
            empty = not len(module.adapters)
        elif isinstance(module, TrainedCopies):
            module.modules_to_save.pop(name) if name in module.modules_to_save else None
            empty = not len(module.modules_to_save)
        else:
            continue
        if empty:
            _replace(model, path, _inner(module))
    if next(adapted_layers(model), None) is None:
        replication.restore(model)


def remove_at(model: nn.Module, paths: list[str], name: str) -> None:
    """Take an adapter off some layers alone."""
    for path, layer in reversed(list(adapted_layers(model))):
        if path in paths:
            layer.adapters.pop(name)
            if not len(layer.adapters):
                _replace(model, path, layer.base_layer)


def strip(model: nn.Module, keep: tuple[str, ...] = ()) -> None:
    """Take every wrapper off. Copies of the adapters in `keep` stay in the model in place of their originals."""
    strip_shared(model)
    calls.forget(model)
    for path, module in reversed(list(targets.walk(model))):
        if isinstance(module, AdaptedLayer):
            _replace(model, path, module.base_layer)
        elif isinstance(module, TrainedCopies):
            chosen = [name for name in keep if name in module.modules_to_save]
            _replace(model, path, module.modules_to_save[chosen[-1]] if chosen else module.original_module)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    resolve(model, parent)._modules[child] = module


@contextmanager
def _undone_on_error() -> Iterator[list[Any]]:
    undo: list[Any] = []
    try:
        yield undo
    except BaseException:
        for step in reversed(undo):
            step()
        raise


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """If the block fails, no parameter of the bare model has another `requires_grad` than before."""
    flags = [(parameter, parameter.requires_grad) for _, parameter in base_parameters(model)]
    try:
        yield
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def freeze(model: nn.Module) -> None:
    """Freeze everything that is not part of an adapter."""
    own = {id(parameter) for parameter in adapter_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)


def adapter_parameters(model: nn.Module, name: str | None = None) -> Iterator[nn.Parameter]:
    """The parameters of one adapter, or of all, each once."""
    seen: set[int] = set()  # tied layers share them
    for held in _holders(model):
        for module in held.values() if name is None else [held[name]] if name in held else ():
            yield from (p for p in module.parameters() if id(p) not in seen)
            seen.update(id(p) for p in module.parameters())


def adapter_tensors(model: nn.Module, name: str) -> list[torch.Tensor]:
    """All that one adapter keeps in memory, buffers included, each once."""
    modules = [held[name] for held in _holders(model) if name in held]
    tensors = itertools.chain(*((*module.parameters(), *module.buffers()) for module in modules))
    return list({id(tensor): tensor for tensor in tensors}.values())


def train(model: nn.Module, selection: Selection, names: Collection[str], trains: bool) -> None:
    """Let the named adapters train or not, whatever the others do."""
    for held in _holders(model) if names else ():
        for name in names:
            if name in held:
                held[name].requires_grad_(trains)
    selection.trained = selection.trained.union(names) if trains else selection.trained.difference(names)


def _holders(model: nn.Module) -> Iterator[nn.ModuleDict]:
    """Everything that holds a part of each adapter under its name: layers, trained copies, what layers share."""
    for _, wrapper in _once(model, (AdaptedLayer, TrainedCopies)):
        yield wrapper.adapters if isinstance(wrapper, AdaptedLayer) else wrapper.modules_to_save
    shared = model._modules.get(SHARED)
    if isinstance(shared, SharedModules):
        yield shared
