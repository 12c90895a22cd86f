"""Grafting adapters onto a model and taking them off again. A call that fails leaves the model as it was."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from deltatune import calls, checks, replication, targets
from deltatune.building import Built, build
from deltatune.config import PeftConfig
from deltatune.copies import TrainedCopies
from deltatune.errors import StateError
from deltatune.fused.adapters import ParameterAdapters
from deltatune.fused.layer import FusedLayer
from deltatune.layer import AdaptedLayer
from deltatune.memory import SMALLER, told
from deltatune.selection import Selection
from deltatune.shared import SHARED, SharedModules, add_shared, remove_shared, strip_shared
from deltatune.slices import check_slices
from deltatune.storage.fingerprint import base_parameters


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
    replicated = replication.replicate(model, getattr(config, "layer_replication", None))
    try:
        with told(f"building adapter {name!r}", SMALLER):
            built = build(model, config, name, autocast_adapter_dtype)
            check_slices(model, _adapted(model, built), built.saved)
            _graft(model, built, name, selection)
            vars(config).update({key: value for key, value in vars(built.config).items() if key != "unknown_fields"})
    except BaseException:
        if replicated:
            replication.restore(model)
        raise


def refuse_adapted(model: nn.Module, around: type) -> None:
    """
    Args:
        around: What stands around a model whose layers are wrapped.

    Raises:
        ConfigError: It is no model.
        StateError: It has adapters already.
    """
    checks.instance("model", model, nn.Module, "the base model, a torch module")
    if isinstance(model, around):
        raise StateError(
            f"the model is a {type(model).__name__} already; add_adapter(name, config) grafts one more adapter onto it",
            field="model",
            found=type(model).__name__,
            expected="a model without adapters",
        )
    if next(adapted_layers(model), None) is not None:
        raise StateError(
            f"the layers of this {type(model).__name__} carry adapters already; use the PeftModel around it, "
            "or unload() it first",
            field="model",
            found=type(model).__name__,
            expected="a model without adapters",
        )


def _adapted(model: nn.Module, built: Built) -> dict[str, nn.Module]:
    found = {path: module for path, module in targets.walk(model) if id(module) in built.adapters}
    return {path: _inner(one) if isinstance(one, AdaptedLayer) else one for path, one in found.items()}


def _graft(model: nn.Module, built: Built, name: str, selection: Selection) -> None:
    tie = getattr(built.config, "ensure_weight_tying", False)
    with _undone_on_error() as undo:
        if built.shared is not None:
            add_shared(model, name, built.shared)
            undo.append(lambda: remove_shared(model, name))
        # backwards: parts before what they are in; a layer that has another name too is adapted under both
        wrappers = _wrappers(model, AdaptedLayer)
        for path, module in reversed(list(targets.walk(model))):
            if id(module) not in built.adapters:
                continue
            adapter = built.adapters[id(module)]
            kind = FusedLayer if isinstance(adapter, ParameterAdapters) else AdaptedLayer
            wrapper = _wrap(model, path, module, kind, wrappers, selection, undo)
            if name not in wrapper.adapters:
                wrapper.add(name, adapter)
                undo.append(lambda wrapper=wrapper: wrapper.adapters.__delitem__(name))
        add_copies(model, built.saved, name, selection, undo, tie)
        read = (value for adapter in built.adapters.values() for value in adapter.reads)
        calls.follow(model, selection, name, read)


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
    for _, parameter in base_parameters(model):
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


def holds(model: nn.Module, name: str) -> bool:
    """Whether anything of the model has a part of an adapter of this name."""
    return any(name in held for held in _holders(model))


def _holders(model: nn.Module) -> Iterator[nn.ModuleDict]:
    """Everything that holds a part of each adapter under its name: layers, trained copies, what layers share."""
    for _, wrapper in _once(model, (AdaptedLayer, TrainedCopies)):
        yield wrapper.adapters if isinstance(wrapper, AdaptedLayer) else wrapper.modules_to_save
    shared = model._modules.get(SHARED)
    if isinstance(shared, SharedModules):
        yield shared
