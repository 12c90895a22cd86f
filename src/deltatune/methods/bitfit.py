"""BitFit: b' = b + d, the biases of the model train and nothing else.   https://arxiv.org/abs/2106.10199"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.config import PeftType, config
from deltatune.factors import shift
from deltatune.methods.common import LayerConfig
from deltatune.targets import map_of, walk


@config
class BitFitConfig(LayerConfig):
    """BitFit's options; PEFT has no such method.

    Attributes:
        target_modules: As for every method; by default every layer that has a bias, norms included. The paper's smaller
            choice, the biases of the queries and of the first layer of each MLP, are such names too.
    """

    def __post_init__(self) -> None:
        self.peft_type = PeftType.BITFIT
        super().__post_init__()


class BitFit(Adapter):
    """Trainable: d, what the bias has moved by. As a difference, so that several add up."""

    base_kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "module"})
    stacks = ()
    views: ClassVar[tuple[str, ...]] = ("bitfit_bias",)

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bitfit_bias = nn.Parameter(torch.zeros(size))

    @classmethod
    def fits(cls, layer: LinearMap) -> bool | str:
        allowed = super().fits(layer)
        return "it has no bias that could be trained" if allowed is True and layer.bias is None else allowed

    @classmethod
    def build(cls, layer: LinearMap, config: BitFitConfig, path: str) -> BitFit:
        assert layer.bias is not None
        return cls(layer.bias.numel())

    def adapt(self, weight: Tensor) -> Tensor:
        return weight

    def adapt_bias(self, bias: Tensor | None) -> Tensor:
        assert bias is not None
        return bias + self.bitfit_bias.view_as(bias)

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        if layer.kind == "module":  # its bias need not be what it adds last
            return super().forward(x, layer)
        return shift(layer(x), self.bitfit_bias, layer)


def _with_bias(model: nn.Module) -> set[str] | None:
    """The paths of all layers that have a bias."""
    layers = {path: map_of(module) for path, module in walk(model)}
    return {path for path, layer in layers.items() if layer is not None and BitFit.fits(layer) is True} or None


METHOD = Method(
    PeftType.BITFIT,
    BitFitConfig,
    BitFit,
    key_prefix="bitfit_",
    find_targets=_with_bias,
    learning_rate=4e-3,  # the paper takes ten times the rate of full fine-tuning and more
)
