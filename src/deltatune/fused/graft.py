"""Which parameters a config targets, and the adapters for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltatune.adapter import Method
from deltatune.bases.experts import Experts
from deltatune.errors import ConfigError, StateError, TargetError
from deltatune.fused import apart
from deltatune.fused.adapters import ParameterAdapters
from deltatune.fused.layer import FusedLayer
from deltatune.fused.lora import ExpertLoRA
from deltatune.layer import AdaptedLayer
from deltatune.notice import warn
from deltatune.patterns import name_matches
from deltatune.suggest import nearest
from deltatune.targets import walk


def build(model: nn.Module, config: Any, name: str, autocast: bool, built: dict[int, Any]) -> None:
    """An adapter for every module with parameters that `config.target_parameters` names; `built` gets them by id."""
    for path, (module, names) in find(model, config).items():
        if id(module) in built:
            raise ConfigError(
                f"{type(config).__name__}: {path} is a target of target_modules, and its parameters {names} are "
                "targets of target_parameters; name it in one of the two (target_modules=[] targets no modules)",
                field="target_parameters",
                path=path,
            )
        owner = _owner(module, path, name)
        each = {key: ExpertLoRA.build(Experts(owner, key), config, f"{path}.{key}") for key in names}
        for key, adapter in each.items():
            _place(adapter, owner._parameters[key], autocast)
        built[id(module)] = ParameterAdapters(each, interleaved=not vars(owner).get("is_concatenated", True))


def convert(model: nn.Module, config: Any) -> None:
    """Targets of an older transformers, which named layers of single experts, as the parameters that they are now."""
    if not isinstance(config.target_modules, (set, list)) or not config.adapts_parameters:
        return
    held = {path: module for path, module in _modules(model) if apart.GATE_UP in _stacks(module)}
    inside = tuple(f"{path}." for path in held)
    paths = [path for path, _ in _modules(model) if not path.startswith(inside)] if held else []
    apart.convert(config, held, lambda name: any(name_matches([name], path) for path in paths))


def _stacks(module: nn.Module) -> set[str]:
    return {name for name, value in _held(module).items() if value.ndim == 3}


def find(model: nn.Module, config: Any) -> dict[str, tuple[nn.Module, list[str]]]:
    """Path -> module and names of its parameters; a module under several paths comes once.

    Raises:
        TargetError: Nothing matches, or a parameter that is named holds no matrices.
    """
    wanted, found, used = list(config.target_parameters), {}, set()
    for path, module in _modules(model):
        owner = module.base_layer if isinstance(module, AdaptedLayer) else module
        for name, parameter in owner._parameters.items():
            hits = [target for target in wanted if parameter is not None and name_matches([target], f"{path}.{name}")]
            if hits:
                _check(f"{path}.{name}", parameter)
                used.update(hits)
                found.setdefault(path, (module, []))[1].append(name)
    top = [name for name in model._parameters if name in wanted]
    if top:
        raise TargetError(
            f"target_parameters: {top[0]!r} is a parameter of the {type(model).__name__} itself, and no wrapper can "
            "stand where the model stands; put the model into another module",
            field="target_parameters",
            found=top,
        )
    dead = sorted(set(wanted) - used)
    if not found:
        raise _nothing(model, dead)
    if dead:
        warn(f"target_parameters: {dead} match no parameter of the model")
    excluded = any(name_matches(config.exclude_modules, path) for path in found)
    if excluded or config.layers_to_transform not in (None, []):
        field = "exclude_modules" if excluded else "layers_to_transform"
        warn(f"{field} chooses among target_modules alone; target_parameters act wherever they match, as in PEFT")
    return found


def targets_no_layer(config: Any, model_type: str | None, method: Method) -> bool:
    """Whether a config that targets parameters targets no layers beside them."""
    if config.target_parameters is None:
        return False
    if config.target_modules is not None:
        return len(config.target_modules) == 0
    return model_type is None or method.usual_targets(model_type, config) is None


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    once: dict[int, tuple[str, nn.Module]] = {}
    for path, module in walk(model):
        once.setdefault(id(module), (path, module))
    return list(once.values())


def _owner(module: nn.Module, path: str, name: str) -> nn.Module:
    """The module that owns the parameters, if one more adapter can be put there."""
    if not isinstance(module, AdaptedLayer):
        return module
    if not isinstance(module, FusedLayer):
        raise StateError(
            f"target_parameters: {path} carries the adapters {list(module.adapters)} of the whole layer already; add "
            "those of its parameters first, or target the layer in target_modules",
            field="target_parameters",
            path=path,
        )
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
    return module.base_layer


def _check(path: str, parameter: Any) -> None:
    if not Experts.fits(parameter):
        raise TargetError(
            f"target_parameters: {path} has shape {tuple(parameter.shape)} and type {parameter.dtype}; matrices "
            "(out, in), or a stack of them with three dimensions, of a floating type can be adapted",
            field="target_parameters",
            path=path,
            found=tuple(parameter.shape),
        )


def _nothing(model: nn.Module, dead: list[str]) -> TargetError:
    known = {f"{path}.{name}" for path, module in _modules(model) for name in _held(module)}
    stacked = [
        f"{path}.{name}" for path, module in _modules(model) for name, value in _held(module).items() if value.ndim == 3
    ]
    endings = {path.rpartition(".")[2]: path for path in known}
    close = [endings[near] for name in dead for near in nearest(name.rpartition(".")[2], endings, 3)]
    examples = (close or stacked or sorted(known))[:5]
    return TargetError(
        f"target_parameters: {dead} match no parameter of {type(model).__name__}; the nearest are {examples}",
        field="target_parameters",
        found=dead,
        expected=examples,
    )


def _held(module: nn.Module) -> dict[str, Any]:
    owner = module.base_layer if isinstance(module, AdaptedLayer) else module
    return {name: value for name, value in owner._parameters.items() if value is not None and Experts.fits(value)}


def _place(adapter: nn.Module, parameter: Any, autocast: bool) -> None:
    half = parameter.dtype in (torch.float16, torch.bfloat16)
    adapter.to(device=parameter.device, dtype=torch.float32 if half and autocast else parameter.dtype)
