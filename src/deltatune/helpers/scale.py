"""How strongly adapters act: for the calls of a block, or from now on in one layer.

Both act on an adapter's `scaling`, the factor of its update, which LoRA has and many others too (LoHa, LoKr, GraLoRA,
bottlenecks, ...). For LoRA a factor m in [0, 1] is a mean of the base and the adapted weights, W + m (W' - W).
https://arxiv.org/abs/2109.01903
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from deltatune.errors import ConfigError, StateError
from deltatune.inject import adapted_layers
from deltatune.layer import AdaptedLayer
from deltatune.notice import warn
from deltatune.selection import has_scale


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float | int) -> Iterator[None]:
    """Within the block, calls of this thread or task see every scale multiplied; no layer is changed.

    Blocks inside of each other multiply. `multiplier=0` leaves the base of methods whose update is a summand.

    Raises:
        ConfigError: The multiplier is no number.
        StateError: No adapter of the model has a scale, or adapters are merged.
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)) or not math.isfinite(multiplier):
        raise ConfigError(
            f"rescale_adapter_scale: multiplier={multiplier!r}, expected a finite number",
            field="multiplier",
            found=multiplier,
            expected="a finite number",
        )
    layers = [layer for _, layer in adapted_layers(model)]
    _check(layers)
    with ExitStack() as stack:
        for selection in {id(layer.selection): layer.selection for layer in layers}.values():
            stack.enter_context(selection.scaled(multiplier))
        yield


def _check(layers: list[AdaptedLayer]) -> None:
    adapters = [adapter for layer in layers for adapter in layer.adapters.values()]
    if not any(map(has_scale, adapters)):
        raise StateError(
            "rescale_adapter_scale: no adapter of this model has a scale, as that of LoRA is",
            field="model",
            found=sorted({type(a).__name__ for a in adapters}),
            expected="an adapter with a scale",
        )
    if any(layer.merged for layer in layers):
        raise StateError(
            "rescale_adapter_scale: adapters are merged into the weights; call unmerge_adapter() first",
            field="adapters",
            found="merged",
            expected="unmerged",
            hint="call unmerge_adapter()",
        )
    unscaled = sorted({type(adapter).__name__ for adapter in adapters if not has_scale(adapter)})
    if unscaled:
        warn(f"rescale_adapter_scale: {', '.join(unscaled)} of this model has no scale and acts as before")


def set_scale(layer: AdaptedLayer, adapter: str, scale: float) -> None:
    """Let one adapter of a layer act with `scale` times what its config says; an adapter it lacks is passed over."""
    _refuse_merged(layer, [adapter])
    layer.set_scale(adapter, scale)


def scale_layer(layer: AdaptedLayer, scale: float) -> None:
    """Multiply the scale of the active adapters of a layer."""
    _refuse_merged(layer, layer.selection.active)
    layer.scale_layer(scale)


def unscale_layer(layer: AdaptedLayer, scale: float | None = None) -> None:
    """Divide the scale of the active adapters of a layer; without a number, back to what their configs say.

    Raises:
        ConfigError: The number is 0; leave it out to go back.
    """
    _refuse_merged(layer, layer.selection.active)
    layer.unscale_layer(scale)


def _refuse_merged(layer: AdaptedLayer, names: Iterable[str]) -> None:
    for name in names:
        if name in layer.merged_adapters:
            raise StateError(
                f"adapter {name!r} is merged into the weights; call unmerge_adapter() before scaling it",
                field="adapter",
                found=name,
                expected="unmerged",
                hint="call unmerge_adapter()",
            )
