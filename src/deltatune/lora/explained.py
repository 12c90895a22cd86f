"""`get_eva_state_dict`: the principal components of what goes into each layer, as many as explain most.

https://arxiv.org/abs/2410.07170
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from deltatune import targets
from deltatune.errors import ConfigError, DataError
from deltatune.inject import adapted_layers
from deltatune.lora.inputs import (
    every_row,
    forward_fn_dict,
    gathered,
    moved,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from deltatune.lora.options import EvaConfig
from deltatune.lora.targeted import in_mode, targeted
from deltatune.lora.watched import Watched, chosen, in_order, settle
from deltatune.patterns import pattern_value
from deltatune.state_dict import ROOT


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: Any = None,
    forward_fn: Callable[[Any, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Any = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Name of a layer -> its A (rank, in): principal components, most telling first; rank may be 0.

    The base runs over the data, again and again if need be, until the components that count have settled.

    Args:
        model: A bare model, or a `PeftModel`, whose adapters are disabled meanwhile.
        dataloader: Batches.
        peft_config: A LoraConfig; of a `PeftModel` its own by default.
        forward_fn: (model, batch) -> runs the model.
        prepare_model_inputs_fn: (batch, config) -> what the next one gets of it; None for the batch itself.
        prepare_layer_inputs_fn: (input of a layer, that, name of the layer) -> rows (n, in); or a dict of such
            functions by name of the layer; None takes every row.
        gather_distributed_inputs: Put the rows of all processes together.
        show_progress_bar: Accepted and without effect.

    Raises:
        DataError: There are no batches, too few rows in them, or the components do not settle.
    """
    config, active = _config(model, peft_config, adapter_name), getattr(model, "disable_adapter", nullcontext)
    options: EvaConfig = config.eva_config or EvaConfig()
    layers, ranks = _layers(model, config, adapter_name)
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))

    def run(batch: Any, hooks: dict[nn.Module, Callable[[Any, Any], None]]) -> None:
        batch = moved(batch, device)
        places = batch if prepare_model_inputs_fn is None else prepare_model_inputs_fn(batch, config)
        with _hooked(hooks, places):
            forward_fn(model, batch)

    with active(), in_mode(model, False):
        rows = _rows(prepare_layer_inputs_fn, layers, gather_distributed_inputs)
        watched = _watched(layers, ranks, rows, options.rho, lambda hooks: run(_first(dataloader), hooks))
        counts = settle(watched, dataloader, sum(ranks.values()), options.tau, run)
    return {name: chosen(watch, counts[name], options.whiten) for watch, name in in_order(watched)}


def _config(model: Any, config: Any, name: str) -> Any:
    configs = getattr(model, "peft_config", None)
    found = configs[name] if config is None and configs else config
    if found is None:
        raise ConfigError("get_eva_state_dict: peft_config is needed for a model without adapters", field="peft_config")
    return found


def _layers(model: nn.Module, config: Any, name: str) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """The linear layers that have the adapter, or would get it, by their names in the model; and their ranks."""
    if not hasattr(model, "peft_config"):
        found = targeted(model, config, "eva", frozenset({"linear"}), others=True)
        return {path: layer.module for path, layer in found.items()}, {path: layer.r for path, layer in found.items()}
    bare: Any = model.get_base_model()  # type: ignore[operator]
    layers = {path: layer for path, layer in adapted_layers(bare) if name in layer.adapters and _is_linear(layer)}
    ranks = {ROOT + path: pattern_value(config.rank_pattern, path, config.r) for path in layers}
    return {ROOT + path: layer for path, layer in layers.items()}, ranks


def _is_linear(module: Any) -> bool:
    layer = None if module.is_block else module.as_map()
    return layer is not None and layer.kind == "linear" and not layer.only_weight


def _rows(given: Any, layers: dict[str, nn.Module], everywhere: bool) -> dict[str, Callable[..., Tensor]]:
    """Name -> what makes rows (n, in) of a layer's input."""
    by_name = given if isinstance(given, dict) else dict.fromkeys(layers, given)
    if unknown := sorted(by_name.keys() - layers.keys()):
        raise ConfigError(
            f"get_eva_state_dict: prepare_layer_inputs_fn names {unknown[:3]}, which are no layers of the adapter; "
            f"they are named like {sorted(layers)[:3]}",
            field="prepare_layer_inputs_fn",
            found=unknown,
            expected=sorted(layers),
        )

    def of(name: str) -> Callable[..., Tensor]:
        make = by_name.get(name) or every_row
        return lambda x, places: gathered(make(x, places, name), everywhere)

    return {name: of(name) for name in layers}


def _watched(
    layers: dict[str, nn.Module], ranks: dict[str, int], rows: Any, rho: float, run: Callable[[Any], None]
) -> list[Watched]:
    """The layers, those with equal inputs together, as one batch shows."""
    seen: dict[str, str] = {}

    def look(name: str) -> Callable[[Any, Any], None]:
        return lambda x, places: seen.update({name: _digest(rows[name](x, places))})

    run({module: look(name) for name, module in layers.items()})
    if unseen := [name for name in layers if name not in seen]:
        raise DataError(f"EVA: {unseen[0]} does not run when forward_fn runs the model", path=unseen[0], found=unseen)
    groups: dict[str, list[str]] = {}
    for name, digest in seen.items():
        groups.setdefault(digest, []).append(name)
    in_model = [sorted(names, key=list(layers).index) for names in groups.values()]
    in_model.sort(key=lambda names: list(layers).index(names[0]))
    limits = [max(round(ranks[name] * rho) for name in names) for names in in_model]
    widths = [targets.map_of(layers[names[0]]).in_features for names in in_model]  # type: ignore[union-attr]
    return [
        Watched(layers[names[0]], rows[names[0]], names, min(limit, width))
        for names, limit, width in zip(in_model, limits, widths)
    ]


def _digest(x: Tensor) -> str:
    return hashlib.sha256(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def _first(dataloader: Iterable[Any]) -> Any:
    for batch in itertools.islice(dataloader, 1):
        return batch
    raise DataError("EVA: the dataloader has no batches", field="dataloader", found=0, expected="at least one batch")


@contextmanager
def _hooked(hooks: dict[nn.Module, Callable[[Any, Any], None]], places: Any) -> Iterator[None]:
    def hook(look: Callable[[Any, Any], None]) -> Callable[..., None]:
        return lambda module, args: look(args, places)

    handles = [module.register_forward_pre_hook(hook(look)) for module, look in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
