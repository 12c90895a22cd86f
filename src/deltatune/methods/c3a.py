"""C3A: W' = W + C / in, C made of circulant blocks, so that C x is a convolution.   https://arxiv.org/abs/2407.19342"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import biases, checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets as loras
from deltatune.config import PeftType, config
from deltatune.factors import circulant, correlate
from deltatune.methods.common import LayerConfig, all_linear
from deltatune.patterns import pattern_value


@config
class C3AConfig(LayerConfig):
    """C3A's options, with PEFT's names and defaults.

    Attributes:
        block_size: Side b of a circulant block; it has to divide both sides of every layer. Larger blocks train less.
        block_size_pattern: Layer name or regular expression -> another block size.
        init_weights: How the kernels are drawn: "xavier_uniform" (False too), "kaiming_uniform" or "gaussian". True
            starts them at zero, so that a fresh adapter changes nothing.
    """

    beyond_peer: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})

    block_size: int = 256
    bias: str = "none"
    block_size_pattern: dict | None = field(default_factory=dict)
    init_weights: bool | str | None = "xavier_uniform"

    def __post_init__(self) -> None:
        self.peft_type = PeftType.C3A
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("C3AConfig", "block_size", self.block_size)
        starts = (True, False, "xavier_uniform", "kaiming_uniform", "gaussian")
        checks.one_of("C3AConfig", "init_weights", self.init_weights, starts)
        biases.check("C3AConfig", self.bias, "c3a_only")


class C3A(Adapter):
    """Trainable: the first rows of the blocks as (out / b, in / b, b), in x out / b numbers."""

    views: ClassVar[tuple[str, ...]] = ("c3a_kernel", "block_size")

    def __init__(self, layer: LinearMap, size: int, init: bool | str) -> None:
        super().__init__()
        self.block_size, self.width, self.kind = size, layer.in_features, layer.kind
        self.c3a_kernel = nn.Parameter(torch.zeros(layer.out_features // size, layer.in_features // size, size))
        if init is not True:
            self.identity_at_birth = f"init_weights={init!r} draws the kernels"
            self._draw(init or "xavier_uniform", layer)

    def _draw(self, init: str, layer: LinearMap) -> None:
        if init == "gaussian":
            nn.init.normal_(self.c3a_kernel)
            return
        # the bounds of the layer's own matrix, not of the kernels
        sides = layer.in_features + layer.out_features
        bound = math.sqrt(6 / sides) if init == "xavier_uniform" else math.sqrt(1 / layer.in_features)
        nn.init.uniform_(self.c3a_kernel, -bound, bound)

    @classmethod
    def build(cls, layer: LinearMap, config: C3AConfig, path: str) -> C3A:
        size = pattern_value(config.block_size_pattern or {}, path, config.block_size)
        both = math.gcd(layer.in_features, layer.out_features)
        sides = f"both sides of {path} ({layer.out_features}, {layer.in_features})"
        checks.divisor("C3AConfig", "block_size", size, both, sides, path, ", also settable by block_size_pattern")
        return cls(layer, size, config.init_weights)  # type: ignore[arg-type]

    def adapt(self, weight: Tensor) -> Tensor:
        return weight + circulant(self.c3a_kernel) / self.width

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        if self.kind == "conv":  # the patches, of which the blocks are, are never laid out
            return super().forward(x, layer)
        y = layer(x)
        update = self._columns(x, layer) if self.kind == "embedding" else correlate(x, self.c3a_kernel)
        return y + (update / self.width).to(y.dtype)

    def _columns(self, x: Tensor, layer: LinearMap) -> Tensor:
        """Columns of C, by their indices: column p of a block reads its first row at p, p - 1, p - 2, ..."""
        size = self.block_size
        turned = (x[..., None] - torch.arange(size, device=x.device)) % size
        found = self.c3a_kernel[:, (x // size)[..., None], turned].movedim(0, -2).flatten(-2)
        scale = layer.apply(x, self.c3a_kernel.new_ones(1, self.width))  # of an embedding that has one
        return found * scale


def usual_targets(model_type: str) -> Any:
    """LoRA's, but in GPT-2 the projection out of the feed-forward layer."""
    return ["mlp.c_proj"] if model_type in ("gpt2", "gpt_bigcode") else loras(model_type)


METHOD = Method(
    PeftType.C3A,
    C3AConfig,
    C3A,
    key_prefix="c3a_",
    default_targets=usual_targets,
    learning_rate=0.3,
    train_options=all_linear,
)
