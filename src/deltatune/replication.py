"""`layer_replication`: a deeper model out of the layers of a shallower one, which share their weights.

It is the depth up-scaling of SOLAR, without copies: [[0, 4], [2, 5]] makes 0 1 2 3 2 3 4 of five layers.
https://arxiv.org/abs/2312.15166
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NoReturn

from torch import nn

from deltatune import checks
from deltatune.errors import ConfigError, StateError
from deltatune.layer import AdaptedLayer

COUNT = "num_hidden_layers"
LISTS = ("layer_types", "mlp_layer_types")  # of a model's config, with an entry per layer
LIMIT = 1000  # layers: a list in a file could ask for any number


class Replicas(nn.ModuleList):
    """Layers in another order, some more than once, each with modules of its own and the tensors of the original.

    Attributes:
        spans: (start, end) of the runs of original layers.
        original: The list that stood here. It is no module of this one: its tensors are there already.
        before: What the model's config said of single layers.
    """

    spans: list[list[int]]
    original: Any
    before: dict[str, Any]
    order: list[int]

    @classmethod
    def of(cls, original: Any, spans: list[list[int]], before: dict[str, Any]) -> Replicas:
        order = [index for start, end in spans for index in range(start, end)]
        made = cls(_replica(original[index], place) for place, index in enumerate(order))
        vars(made).update(original=original, spans=spans, before=before, order=order)
        return made


def check(owner: str, spans: Any) -> None:
    """Refuse what is no list of (start, end)."""
    if spans is None:
        return
    for span in spans:
        whole = isinstance(span, (list, tuple)) and len(span) == 2 and all(type(end) is int for end in span)
        if not whole or not 0 <= span[0] < span[1]:
            _refuse(owner, spans, f"{span!r} is no pair (start, end) of layer numbers with 0 <= start < end")
    count = sum(end - start for start, end in spans)
    if not 0 < count <= LIMIT:
        _refuse(owner, spans, f"it makes {count} layers; 1 to {LIMIT} can be made")


def replicate(model: nn.Module, spans: list[Any] | None) -> bool:
    """Replicate the layers as a config asks; whether that had to be done.

    Raises:
        ConfigError: The model has no such layers.
        StateError: They are replicated otherwise already, or carry adapters.
    """
    wanted = None if spans is None else [list(span) for span in spans]
    present = next((layers.spans for _, _, layers in _replicated(model)), None)
    if wanted == present:
        return False
    if present is not None:
        raise StateError(
            f"layer_replication={spans!r}: the layers of this model are replicated as {present}; all adapters of a "
            "model have the same list",
            field="layer_replication",
            found=spans,
            expected=present,
        )
    assert wanted is not None
    _put_in(model, wanted)
    return True


def replicate_layers(model: nn.Module, layer_map: list[tuple[int, int]]) -> None:
    """Make a model deeper for good: its layers in another order, some repeated, with the weights that they have.

    `layer_replication` of a config does the same for as long as the adapter is there.

    Args:
        model: A bare decoder or encoder.
        layer_map: (start, end) of the runs of layers, as in [[0, 4], [2, 5]].

    Raises:
        ConfigError: `layer_map` is no such list, or the model has no such layers.
        StateError: The layers carry adapters, or are replicated by a config.
    """
    check("replicate_layers", layer_map)
    if _replicated(model):
        _refuse_state(layer_map, "are replicated for an adapter")
    holder, name = _put_in(model, [list(span) for span in layer_map])
    holder._modules[name] = nn.ModuleList(holder._modules[name])  # type: ignore[arg-type]


def _put_in(model: nn.Module, spans: list[list[int]]) -> tuple[nn.Module, str]:
    """Replicas in the place of the layers; where that is."""
    holder, name = _layers_of(model)
    layers: Any = holder._modules[name]
    _check_range(model, spans, len(layers))
    config = getattr(model, "config", None)
    if any(isinstance(module, AdaptedLayer) for module in model.modules()):
        _refuse_state(spans, "carry adapters already")
    made = Replicas.of(layers, spans, _counted(config))
    holder._modules[name] = made
    _recount(config, made.order)
    return holder, name


def restore(model: nn.Module) -> None:
    """Put the original layers back."""
    for holder, name, layers in _replicated(model):
        for replica, index in zip(layers, layers.order):
            for own, other in zip(layers.original[index].modules(), replica.modules()):
                own._parameters.update(other._parameters)  # the model may have been moved meanwhile
                own._buffers.update(other._buffers)
                own.training = other.training
        holder._modules[name] = layers.original
        for key, value in layers.before.items():
            setattr(model.config, key, value)


def unshare(model: nn.Module) -> None:
    """Give every replica weights of its own, so that what is left is an ordinary model."""
    for holder, name, layers in _replicated(model):
        holder._modules[name] = nn.ModuleList(layers)
        seen: set[int] = set()
        for owner in layers.modules():
            for key, parameter in owner._parameters.items():
                if parameter is not None and id(parameter) in seen:
                    owner._parameters[key] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                elif parameter is not None:
                    seen.add(id(parameter))


def _refuse(owner: str, spans: Any, why: str) -> NoReturn:
    raise ConfigError(
        f"{owner}: layer_replication={checks.shown(spans)}: {why}; an example is [[0, 4], [2, 5]]",
        field="layer_replication",
        found=spans,
    )


def _refuse_state(spans: Any, why: str) -> NoReturn:
    raise StateError(
        f"layer_replication={spans!r}: the layers of this model {why}; unload() first",
        field="layer_replication",
        found=spans,
    )


def _check_range(model: nn.Module, spans: list[list[int]], count: int) -> None:
    last = max(end for _, end in spans)
    if last > count:
        raise ConfigError(
            f"layer_replication={checks.shown(spans)}: {last} is past the end; {type(model).__name__} has {count} "
            f"layers, so ends of up to {count} are possible",
            field="layer_replication",
            found=spans,
            expected=count,
        )


def _layers_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the list of transformer layers, and the list's name in it."""
    found = list(_lists(model, getattr(getattr(model, "config", None), COUNT, None)))
    if len(found) != 1:
        raise ConfigError(
            f"layer_replication: {type(model).__name__} has {len(found)} lists of layers that could be replicated; a "
            "model with one, a decoder or an encoder alone, can have it",
            field="layer_replication",
            found=len(found),
            expected=1,
        )
    return found[0]


def _lists(module: nn.Module, count: int | None) -> Iterator[tuple[nn.Module, str]]:
    """Lists as long as the model's config says it is deep; without a config all that are in no other list."""
    for name, child in module._modules.items():
        if isinstance(child, nn.ModuleList):
            if count is None or len(child) == count:
                yield module, name
        elif child is not None:
            yield from _lists(child, count)


def _replicated(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    return [
        (holder, name, child)
        for holder in dict.fromkeys(_own_modules(model))
        for name, child in holder._modules.items()
        if isinstance(child, Replicas)
    ]


def _own_modules(module: nn.Module) -> Iterator[nn.Module]:
    """A model's modules without those of its adapters, of which there may be thousands."""
    yield module
    for name, child in module._modules.items():
        if child is not None and not (isinstance(module, AdaptedLayer) and name == "adapters"):
            yield from _own_modules(child)


def _replica(layer: nn.Module, place: int) -> nn.Module:
    """The layer's modules once more, with its own tensors in them, as the layer at another place."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}
    for module in layer.modules():
        shared |= {id(value): value for name, value in vars(module).items() if name == "config"}
    made = copy.deepcopy(layer, shared)
    for module in made.modules():
        if "layer_idx" in vars(module):  # which place of the cache is the layer's
            vars(module)["layer_idx"] = place
    return made


def _counted(config: Any) -> dict[str, Any]:
    """What a model's config says of single layers."""
    values = {name: getattr(config, name, None) for name in (COUNT, *LISTS)}
    return {name: copy.copy(value) for name, value in values.items() if value is not None}


def _recount(config: Any, order: list[int]) -> None:
    for name, value in _counted(config).items():
        setattr(config, name, len(order) if name == COUNT else [value[index] for index in order])
