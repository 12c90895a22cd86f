"""`add_weighted_adapter`: several adapters of any methods as one, a weighted sum of what they change."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltatune import inject
from deltatune.combine import lora, naming, sums
from deltatune.combine.arguments import BY_SVD, Request, checked
from deltatune.combine.changes import check, read
from deltatune.errors import MergeError
from deltatune.layer import AdaptedLayer
from deltatune.notice import warn
from deltatune.registry import METHODS

LOST_WORTH_SAYING = 0.1  # of what a layer should have held


@torch.no_grad()
def add_weighted_adapter(
    model: Any, adapters: Iterable[str], weights: Iterable[float] | Tensor, adapter_name: str, **options: Any
) -> dict[str, float]:
    """`PeftModel.add_weighted_adapter`, where the options are told."""
    ask = checked(model, adapters, weights, adapter_name, **options)
    base = model.get_base_model()
    configs = {name: model.peft_config[name] for name in ask.adapters}
    copies = lora.Copies.of(base, configs)
    if (own := _sum_of_its_own(base, configs, ask)) is not None:
        config, tensors = own
        lora.add(model, adapter_name, config, lambda path, made: made.load_file_tensors(tensors[path]), copies)
        return {}
    for name in configs:
        check(base, name)
    layers = lora.of_one_rank(base, _combined(base, ask))
    config = lora.config_for(base, layers, configs[ask.adapters[0]])
    lora.add(model, adapter_name, config, lambda path, made: layers[path].fill(made), copies)
    return _reported({path: layer.error for path, layer in layers.items()}, ask)


def _terms(base: Any, ask: Request) -> dict[str, list[tuple[float, AdaptedLayer, str]]]:
    """By layer, which adapters are on it and what they weigh."""
    found = {}
    for path, layer in inject.adapted_layers(base):
        own = [(w, layer, name) for name, w in zip(ask.adapters, ask.weights) if name in layer.adapters]
        if own:
            found[path] = own
    return found


def _combined(base: Any, ask: Request) -> dict[str, lora.Factors]:
    """One layer after the other, so that no more than the dense matrices of one are there at a time."""
    layers, rank = _terms(base, ask), ask.svd_rank
    if ask.combination_type in BY_SVD and rank is None:
        rank = _highest_rank(layers)
    return {
        path: sums.of_layer(
            path, [sums.Term(w, read(layer, name), ask.density_of(name)) for w, layer, name in terms], ask, rank
        )
        for path, terms in layers.items()
    }


@torch.no_grad()
def _highest_rank(layers: Mapping[str, list[tuple[float, AdaptedLayer, str]]]) -> int:
    ranks = [0]
    for path, terms in layers.items():
        for _, layer, name in terms:
            factors = layer.adapters[name].low_rank(layer.as_map())  # type: ignore[operator]
            if factors is None:
                kind = type(layer.adapters[name]).__name__
                raise MergeError(
                    f"svd_rank: {name!r} is {kind}, whose change at {path} has no rank of its own; give the rank that "
                    "the combined adapter is to have",
                    field="svd_rank",
                    path=path,
                )
            ranks.append(len(factors[1]))
    return max(ranks)


def _sum_of_its_own(
    base: Any, configs: dict[str, Any], ask: Request
) -> tuple[Any, dict[str, dict[str, Tensor]]] | None:
    """Config and tensors by layer where all adapters are of one method that has sums of its own kind."""
    kinds = {config.peft_type for config in configs.values()}
    method = METHODS[kinds.pop()]
    if (
        kinds
        or method.weighted_sum is None
        or ask.svd_rank is not None
        or ask.combination_type not in ("svd", "linear")
    ):
        return None
    terms = list(zip(ask.weights, ask.adapters))
    there = {path: dict(layer.adapters.items()) for path, layer in inject.adapted_layers(base)}
    there = {path: adapters for path, adapters in there.items() if not configs.keys().isdisjoint(adapters)}
    # a sum of changes counts from what changes nothing: 1 + sum w (l - 1)
    rest = [(1.0 - sum(ask.weights), None)] if ask.combination_type == "linear" else []
    options, tensors = method.weighted_sum(
        {path: [(w, adapters.get(name)) for w, name in terms] + rest for path, adapters in there.items()}
    )
    part = options.pop("part", None)
    names, own = naming.with_part(base, list(tensors), part[1] if part else ())
    cleared = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "modules_to_save": None}
    fields = {"target_modules": names, **({part[0]: own} if part else {})}
    return dataclasses.replace(next(iter(configs.values())), **cleared, **fields), tensors


def _reported(errors: dict[str, float], ask: Request) -> dict[str, float]:
    path, error = max(errors.items(), key=lambda item: item[1])
    if error > LOST_WORTH_SAYING:
        warn(
            f"add_weighted_adapter: the rank of {ask.adapter_name!r} cannot hold {error:.0%} of the sum at {path}; "
            "a higher svd_rank holds more of it, combination_type='linear' all of it"
        )
    return errors
