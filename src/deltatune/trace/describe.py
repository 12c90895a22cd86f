"""From what was seen to the report: each function describes one kind of stop."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

import deltatune
from deltatune import inject, registry
from deltatune.adapter import Adapter
from deltatune.inputs.prompt import Input
from deltatune.layer import AdaptedLayer
from deltatune.model import PeftModel
from deltatune.prompts.encoder import KeyValueEncoder
from deltatune.prompts.key_values import Prefix
from deltatune.prompts.stage import Stage
from deltatune.shared import shared_modules
from deltatune.trace.gradients import Gradients
from deltatune.trace.report import (
    DEAD,
    LIVE,
    WAITING,
    AdapterPart,
    ConfigStop,
    CopyStop,
    GradientStop,
    InputStop,
    LayerStop,
    LossStop,
    MethodStop,
    Parameter,
    Part,
    PrefixStop,
    TaskStop,
    TraceReport,
)
from deltatune.trace.stops import stops
from deltatune.trace.watch import Watch, where


def report(
    model: PeftModel,
    batch: Mapping[str, Any],
    names: tuple[str, ...],
    watch: Watch,
    gradients: Gradients,
    loss: LossStop,
) -> TraceReport:
    base = model.base_model.model
    prefixes = [_prefix(model.prefixes[name], watch, gradients) for name in names if name in model.prefixes]
    layers = [
        _layer(path, layer, names, watch, gradients)
        for path, layer in inject.adapted_layers(base)
        if any(name in layer.adapters for name in names)
    ]
    inputs = [_input(prompt, gradients) for name in names if isinstance(prompt := model.prompts.get(name), Input)]
    copies = [
        CopyStop(where(type(kept)), path, name, _plain_parameters(kept.modules_to_save[name], gradients))
        for path, kept in inject.trained_copies(base)
        for name in names
        if name in kept.modules_to_save
    ]
    made = TraceReport(
        version=deltatune.__version__,
        batch={key: list(value.shape) for key, value in batch.items() if isinstance(value, Tensor)},
        active=list(names),
        inactive=[name for name in model.peft_config if name not in names],
        configs=[_config(name, model.peft_config[name]) for name in names],
        methods=[_method(name, model.peft_config[name]) for name in names],
        task=_task(model, base),
        prefixes=prefixes,
        layers=layers,
        calls=watch.calls,
        copies=copies,
        loss=loss,
        gradient=_sum(model, names, gradients, prefixes, inputs, layers, copies),
        inputs=inputs,
    )
    made.stops = stops(made)
    return made


def _config(name: str, config: Any) -> ConfigStop:
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(config)
    }
    values = {key: _plain(value) for key, value in vars(config).items() if key in defaults}
    return ConfigStop(
        where(type(config)), name, {key: value for key, value in values.items() if value != _plain(defaults[key])}
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(part) for part in value)
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def _method(name: str, config: Any) -> MethodStop:
    entry = registry.METHODS[config.peft_type]
    home = sys.modules[(entry.adapter or entry.config).__module__]
    return MethodStop(
        where="deltatune.registry:METHODS",
        adapter=name,
        method=entry.name.upper(),
        config_class=where(entry.config),
        trained_class=where(entry.adapter or entry.encoder),
        formula=" ".join(
            (home.__doc__ or "").strip().partition("\n")[0].split()
        ),  # every method's file begins with its formula and paper
    )


def _task(model: PeftModel, base: nn.Module) -> TaskStop:
    trainable, total = model.get_nb_trainable_parameters()
    task = model.active_peft_config.task_type
    return TaskStop(
        where=where(type(model)),
        task_type=None if task is None else str(getattr(task, "value", task)),
        base_class=where(type(base)),
        model_type=str(getattr(model.config, "model_type", "custom")),
        trainable=trainable,
        total=total,
        training=model.training,
    )


# -------------------------------------------------------------------------------------------------- prompts, prefixes


def _input(prompt: Input, gradients: Gradients) -> InputStop:
    weight = prompt.encoder.embedding.weight
    used = 2 if prompt.config.reaches_decoder and len(weight) > prompt.config.length else 1
    paths = [path for _, path in sorted(prompt.stage.places.paths.items())][:used]  # the encoder's first
    return InputStop(
        where=where(type(prompt.encoder)),
        adapter=prompt.name,
        virtual_tokens=prompt.config.length,
        rows=list(weight.shape),
        sides=dict.fromkeys(paths, int(prompt.config.length)),
        parameters=gradients.parameters(prompt.encoder),
    )


def _prefix(prefix: Prefix, watch: Watch, gradients: Gradients) -> PrefixStop:
    encoder, rows = prefix.encoder, watch.rows[prefix.name]
    count = len(rows)
    narrow = rows.shape[1] if encoder.transform is None else encoder.transform[0].in_features
    steps = [("virtual tokens", [count]), ("embedding", [count, narrow])]
    for layer in encoder.transform or ():
        width = layer.out_features if isinstance(layer, nn.Linear) else steps[-1][1][1]
        steps.append((type(layer).__name__, [count, width]))
    return PrefixStop(
        where=where(type(encoder).forward),
        where_cut=where(KeyValueEncoder.keys_values),
        where_bound=where(Stage.bind),
        adapter=prefix.name,
        virtual_tokens=count,
        projection=encoder.transform is not None,
        layout=prefix.config.layout,
        shift=count if prefix.config.layout == "peft" else 0,
        steps=steps,
        parameters=gradients.parameters(encoder),
        parts=_parts(prefix, rows, watch, gradients),
    )


def _parts(prefix: Prefix, rows: Tensor, watch: Watch, gradients: Gradients) -> list[Part]:
    """One big tensor holds the keys and values of all sites, so its gradient is looked at column by column."""
    encoder, parts, start = prefix.encoder, [], 0
    called = {call.module for call in watch.calls}
    for index, (heads, dim, value_heads, value_dim) in enumerate(encoder.shapes):
        readers = [site.name for site, part in zip(prefix.sites, encoder.layer_of_site) if part == index]
        reason = ""
        if not readers:
            reason = "no attention reads it"
        elif called.isdisjoint(readers):
            reason = "its attention was not called"
        middle, end = start + heads * dim, start + heads * dim + value_heads * value_dim
        key = gradients.judge(rows, slice(start, middle), reason)
        value = gradients.judge(rows, slice(middle, end), reason)
        norms = [float(rows[:, a:b].detach().float().norm()) for a, b in ((start, middle), (middle, end))]
        parts.append(
            Part(
                index=index,
                site=prefix.sites[index].name,
                kind=prefix.sites[index].kind,
                readers=readers,
                columns=[start, end],
                key_shape=[heads, len(rows), dim],
                value_shape=[value_heads, len(rows), value_dim],
                key_norm=norms[0],
                value_norm=norms[1],
                key=key,
                value=value,
                dead=key.state == DEAD and value.state == DEAD,
            )
        )
        start = end
    return parts


# --------------------------------------------------------------------------------------------------------------- layers


def _layer(path: str, layer: AdaptedLayer, names: tuple[str, ...], watch: Watch, gradients: Gradients) -> LayerStop:
    passage = watch.passages[id(layer)]
    reason = "" if passage.calls else "its layer was not called"
    own = [name for name in names if name in layer.adapters]
    return LayerStop(
        where=where(AdaptedLayer.forward),
        path=path,
        layer_class=type(layer.base_layer).__name__,
        weight=None if layer.is_block else list(layer.as_map().weight.shape),
        calls=passage.calls,
        input_shape=passage.input_shape,
        output_shape=passage.output_shape,
        adapters=[_adapter(name, layer, own[:index], gradients, reason) for index, name in enumerate(own)],
    )


def _adapter(name: str, layer: AdaptedLayer, below: list[str], gradients: Gradients, reason: str) -> AdapterPart:
    adapter: Any = layer.adapters[name]
    parameters = gradients.parameters(adapter, reason)
    base_norm = delta_norm = None
    if adapter.mergeable is True and not layer.is_block:
        below = [other for other in below if layer.adapters[other].mergeable is True]
        base_norm, delta_norm = _norms(adapter, layer.as_map(below).weight)
    views = {view: getattr(adapter, view) for view in adapter.views}
    return AdapterPart(
        where=where(type(adapter)),
        adapter=name,
        facts={view: value for view, value in views.items() if isinstance(value, (int, float, bool, str))},
        base_norm=base_norm,
        delta_norm=delta_norm,
        parameters=parameters,
        dead=bool(parameters) and all(parameter.gradient.state == DEAD for parameter in parameters),
    )


@torch.no_grad()
def _norms(adapter: Adapter, weight: Tensor) -> tuple[float, float]:
    """Of the weight below an adapter, and of adapt(W) - W; in float64, where a small change beside W is not rounded."""
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    below = weight.detach().to(dtype)
    twin = copy.deepcopy(adapter).to(dtype).eval()
    if twin.shared is not None:  # which is no part of it
        twin.shared.to(dtype)
    delta = twin.adapt(below) - below
    return float(torch.linalg.vector_norm(below)), float(torch.linalg.vector_norm(delta))


def _plain_parameters(module: nn.Module, gradients: Gradients) -> list[Parameter]:
    return [gradients.parameter(name, parameter) for name, parameter in module.named_parameters()]


# ------------------------------------------------------------------------------------------------------------ gradients


def _sum(
    model: PeftModel,
    names: tuple[str, ...],
    gradients: Gradients,
    prefixes: list[PrefixStop],
    inputs: list[InputStop],
    layers: list[LayerStop],
    copies: list[CopyStop],
) -> GradientStop:
    base = model.base_model.model
    known = {id(p) for name in names for p in inject.adapter_parameters(base, name)}
    known -= {id(p) for shared in shared_modules(base).values() for p in shared.parameters()}  # of no single layer
    told = [prompt for name in names if isinstance(prompt := model.prompts.get(name), (Prefix, Input))]
    known |= {id(p) for prompt in told for p in prompt.encoder.parameters()}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    others = [gradients.parameter(name, p) for name, p in trainable if id(p) not in known]
    listed: list[Parameter] = [*others]
    for prompt in [*prefixes, *inputs]:
        listed += prompt.parameters
    for stop in [*(part for layer in layers for part in layer.adapters), *copies]:
        listed += stop.parameters
    dead = sum(p.size for p in listed if p.gradient.state == DEAD)
    for prefix in prefixes:
        if any(part.dead for part in prefix.parts):  # whole columns of a tensor that is live elsewhere
            dead += sum(p.gradient.zeros for p in prefix.parameters if p.gradient.state == LIVE)
    waiting = sum(p.size for p in listed if p.gradient.state == WAITING)
    elements = sum(p.numel() for _, p in trainable)
    found = [grad for _, p in trainable if (grad := gradients.of(p)) is not None]
    norm = float(torch.stack([grad.float().norm() for grad in found]).norm()) if found else None
    total = sum(p.numel() for p in model.parameters())
    note = "" if trainable else "nothing is trainable: load the adapter with is_trainable=True to see gradients"
    return GradientStop(
        where=where(inject.train),
        norm=norm if norm is None or norm < float("inf") else None,
        tensors=len(trainable),
        elements=elements,
        live=elements - dead - waiting if gradients.has_loss else 0,
        waiting=waiting,
        dead=dead,
        frozen=total - elements,
        others=others,
        note=note,
    )
