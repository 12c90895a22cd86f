"""What is grafted where, and in what state: `get_layer_status`, `get_model_status`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from deltatune.adapter import Adapter
from deltatune.counting import parameter_counts
from deltatune.errors import StateError
from deltatune.inject import adapted_layers, trained_copies
from deltatune.registry import METHODS

Answer = bool | Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """One wrapped layer."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Answer]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The whole model; "irregular" where its layers disagree."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: Answer
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, Answer]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Literal["irregular"] | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """One entry per wrapped layer, in the order of the model; prefixes come last, under their attention's name."""
    bare = _bare(model)
    entries: list[TunerLayerStatus] = []
    for path, layer in adapted_layers(bare):
        entries.append(_entry(path, _kind(layer), layer, layer.adapters, layer.merged_adapters))
    for path, copies in trained_copies(bare):
        entries.append(_entry(path, "TrainedCopies", copies, copies.modules_to_save, []))
    if not entries and not getattr(model, "peft_config", None):
        raise StateError(
            f"this {type(bare).__name__} carries no adapters, so there is no status to tell; "
            "get_peft_model() puts some on it",
            found=type(bare).__name__,
        )
    return entries


def _kind(layer: Any) -> str:
    """As PEFT says it: the method, and the class of the layer."""
    adapters = [type(adapter) for adapter in layer.adapters.values()][:1]
    names = [method.name for method in METHODS.values() if method.adapter in adapters][:1]
    return ".".join([*names, type(layer.base_layer).__name__])


def _entry(path: str, kind: str, wrapper: Any, holders: nn.ModuleDict, merged: list[str]) -> TunerLayerStatus:
    selection = wrapper.selection
    return TunerLayerStatus(
        name=f"model.{path}",
        module_type=kind,
        enabled=selection.enabled,
        active_adapters=list(selection.active),
        merged_adapters=merged,
        requires_grad={name: _one(p.requires_grad for p in _everything(module)) for name, module in holders.items()},
        available_adapters=sorted(holders),
        devices={name: sorted({p.device.type for p in _everything(module)}) for name, module in holders.items()},
        quantization_backend=getattr(getattr(wrapper, "quantization_backend", None), "backend_name", None),
    )


def _everything(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.everything() if isinstance(module, Adapter) else module.parameters()


def get_model_status(model: nn.Module) -> TunerModelStatus:
    layers, bare = get_layer_status(model), _bare(model)
    configs = getattr(model, "peft_config", {})
    trainable, total = parameter_counts(model)
    prompts = getattr(model, "prompt_encoder", {})
    names = sorted({name for layer in layers for name in layer.available_adapters} | set(prompts))
    encoders = {name: [p.requires_grad for p in encoder.parameters()] for name, encoder in prompts.items()}
    selection = getattr(getattr(model, "base_model", None), "selection", None)
    merged = [layer.merged_adapters for layer in layers if layer.module_type != "TrainedCopies"]
    return TunerModelStatus(
        base_model_type=type(bare).__name__,
        adapter_model_type=_tuner_name(model),
        peft_types={
            name: str(getattr(config.peft_type, "value", config.peft_type)) for name, config in configs.items()
        },
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=selection.enabled if selection is not None else _one(layer.enabled for layer in layers),
        active_adapters=list(selection.active) if selection is not None else _same(x.active_adapters for x in layers),
        merged_adapters=_same(merged) if merged else [],
        requires_grad={
            name: _one(
                [layer.requires_grad[name] for layer in layers if name in layer.requires_grad] + encoders.get(name, [])
            )
            for name in names
        },
        available_adapters=names,
        devices={name: sorted({d for layer in layers for d in layer.devices.get(name, [])}) for name in names},
        quantization_backend=_same(layer.quantization_backend for layer in layers) if layers else None,
    )


def _tuner_name(model: nn.Module) -> str:
    """PEFT's class for what is around the base: by the method, if there is one."""
    from deltatune.peer.methods import TUNERS

    types = {config.peft_type for config in getattr(model, "peft_config", {}).values()}
    names = [named.model for named in TUNERS if types == {named.peft_type}]
    return names[0] if names else type(getattr(model, "base_model", _bare(model))).__name__


def _bare(model: nn.Module) -> nn.Module:
    from deltatune.model import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def _one(answers: Any) -> Answer:
    answers = list(answers)
    return answers[0] if answers and all(answer == answers[0] for answer in answers) else "irregular"


def _same(lists: Any) -> Any:
    lists = list(lists)
    return lists[0] if all(part == lists[0] for part in lists) else "irregular"
