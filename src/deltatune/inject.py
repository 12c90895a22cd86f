"""Grafting adapters onto a model and taking them off again. A call that fails leaves the model as it was."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from deltatune import calls, targets
from deltatune.adapter import Adapter
from deltatune.bases.block import Block, width_of
from deltatune.config import PeftConfig
from deltatune.copies import TrainedCopies
from deltatune.errors import ConfigError, StateError, TargetError
from deltatune.layer import AdaptedLayer
from deltatune.registry import METHODS
from deltatune.selection import Selection
from deltatune.suggest import nearest


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Bare paths and wrappers, each wrapper once."""
    yield from _once(model, AdaptedLayer)


def trained_copies(model: nn.Module) -> Iterator[tuple[str, TrainedCopies]]:
    yield from _once(model, TrainedCopies)


def _once(model: nn.Module, kind: type) -> Iterator[tuple[str, Any]]:
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
    method = METHODS[config.peft_type]  # type: ignore[index]
    assert method.adapter is not None
    config.validate()
    resolved: Any = copy.copy(config)
    targets.with_defaults(resolved, model, method.default_targets)
    found = targets.find(model, resolved, "block" in method.adapter.base_kinds)
    saved = find_saved(model, resolved)
    built: dict[int, Adapter] = {}
    for path, module in found.items():
        if id(module) not in built:
            built[id(module)] = _build(method.adapter, model, module, resolved, path, name, autocast_adapter_dtype)
    with _undone_on_error() as undo:
        # backwards: parts before what they are in; a layer that has another name too is adapted under both
        for path, module in reversed(list(targets.walk(model))):
            if id(module) not in built:
                continue
            wrapper = _wrap(model, path, module, AdaptedLayer, selection, undo)
            if name not in wrapper.adapters:
                wrapper.add(name, built[id(module)])
                undo.append(lambda wrapper=wrapper: wrapper.adapters.__delitem__(name))
        add_copies(model, saved, name, selection, undo)
        calls.follow(model, selection, name, (value for adapter in built.values() for value in adapter.reads))
    vars(config).update({key: value for key, value in vars(resolved).items() if key != "unknown_fields"})


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
    model: nn.Module, saved: dict[str, nn.Module], name: str, selection: Selection, undo: list[Any] | None = None
) -> None:
    for path, module in saved.items():
        wrapper = _wrap(model, path, module, TrainedCopies, selection, undo)
        if name not in wrapper.modules_to_save:
            wrapper.add(name)


def _build(
    kind: type[Adapter],
    model: nn.Module,
    module: nn.Module,
    config: PeftConfig,
    path: str,
    name: str,
    autocast: bool,
) -> Adapter:
    if isinstance(module, AdaptedLayer):
        if name in module.adapters:
            raise StateError(f"layer {path} has an adapter named {name!r} already", field="adapter_name", found=name)
        if module.merged:
            raise StateError(f"layer {path} has merged adapters; call unmerge_adapter() before adding {name!r}")
        layer, holder = module.as_map(), module.base_layer
    else:
        layer, holder = targets.as_map(module), module
    if layer is None or layer.kind == "block":
        layer = Block(holder, width=width_of(model, path))
    if layer.kind not in kind.base_kinds:
        raise TargetError(
            f"target {path!r} is a {type(getattr(module, 'base_layer', module)).__name__}, which {kind.__name__} "
            f"cannot adapt; its maths allows {', '.join(sorted(kind.base_kinds))} layers",
            field="target_modules",
            path=path,
        )
    if getattr(config, "r", 0) and config.r > max(layer.in_features, layer.out_features):  # type: ignore[attr-defined]
        limit = max(layer.in_features, layer.out_features)
        raise ConfigError(
            f"{type(config).__name__}: r={config.r} is larger than both sides of {path} "  # type: ignore[attr-defined]
            f"({layer.out_features}, {layer.in_features}); use at most {min(layer.in_features, layer.out_features)}",
            field="r",
            expected=limit,
        )
    half = layer.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if half and autocast else layer.dtype
    device = next(itertools.chain(holder.parameters(), holder.buffers())).device
    made = kind.build(layer, config, path)
    if layer.only_weight and made.mergeable is not True:
        raise TargetError(
            f"target {path!r} is a {type(holder).__name__}, which is adapted through its weight alone, and no weight "
            f"can hold {kind.__name__}: {made.mergeable}; target layers around it",
            field="target_modules",
            path=path,
        )
    return made.to(device=device, dtype=dtype)


def _wrap(
    model: nn.Module, path: str, module: nn.Module, kind: Any, selection: Selection, undo: list[Any] | None
) -> Any:
    """The wrapper at a path, put there if there is none; a module with several paths gets one wrapper for all."""
    parent, _, child = path.rpartition(".")
    holder = resolve(model, parent)
    present = holder._modules[child]
    if isinstance(present, kind):
        return present
    others = [other for _, other in _once(model, kind) if _inner(other) is module]
    wrapper = others[0] if others else kind(module, selection)
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
    calls.forget(model, name)
    for path, module in reversed(list(targets.walk(model))):
        if isinstance(module, AdaptedLayer):
            module.adapters.pop(name) if name in module.adapters else None
            empty = not len(module.adapters)
        elif isinstance(module, TrainedCopies):
            module.modules_to_save.pop(name) if name in module.modules_to_save else None
            empty = not len(module.modules_to_save)
        else:
            continue
        if empty:
            _replace(model, path, _inner(module))


def strip(model: nn.Module, keep: tuple[str, ...] = ()) -> None:
    """Take every wrapper off. Copies of the adapters in `keep` stay in the model in place of their originals."""
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
    """If the block fails, no parameter of the model has another `requires_grad` than before."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
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
    for _, layer in adapted_layers(model):
        for key, adapter in layer.adapters.items():
            if name is None or key == name:
                yield from adapter.parameters()
    for _, copies in trained_copies(model):
        for key, module in copies.modules_to_save.items():
            if name is None or key == name:
                yield from module.parameters()


def train_only(model: nn.Module, names: tuple[str, ...], inference_mode: bool = False) -> None:
    """Among all adapters, let exactly the named ones train (none in inference mode)."""
    for _, layer in adapted_layers(model):
        for key, adapter in layer.adapters.items():
            adapter.requires_grad_(key in names and not inference_mode)
    for _, copies in trained_copies(model):
        for key, module in copies.modules_to_save.items():
            module.requires_grad_(key in names and not inference_mode)
