"""HiRA: W' = W + W * (B A), elementwise.   https://openreview.net/forum?id=TwJrTz9cRS"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets
from deltatune.config import PeftType, config
from deltatune.factors import input_dropout
from deltatune.methods.common import LayerConfig, all_linear
from deltatune.patterns import pattern_value


@config
class HiraConfig(LayerConfig):
    """HiRA's options, with PEFT's names and defaults.

    Attributes:
        r: Rank of B A; the change of the weight, W * (B A), usually has full rank.
        hira_dropout: Dropout on the input of the change, in training.
        init_weights: True: A uniform (Kaiming), B zero. "gaussian": A ~ N(0, 1 / r^2), B zero. False: both random, so
            that a fresh adapter changes the output.
        rank_pattern: Layer name or regular expression -> another rank.
        fan_in_fan_out: Accepted and ignored: how a layer stores its weight is read off the layer.
    """

    r: int = 32
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str | None = True
    rank_pattern: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.peft_type = PeftType.HIRA
        self.rank_pattern = self.rank_pattern or {}
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("HiraConfig", "r", self.r)
        checks.probability("HiraConfig", "hira_dropout", self.hira_dropout)
        checks.one_of("HiraConfig", "init_weights", self.init_weights, (True, False, None, "gaussian"))


class HiRA(Adapter):
    """Trainable: A (r, in) and B (out, r), r (in + out) numbers, in the shapes in which files keep them."""

    views: ClassVar[tuple[str, ...]] = (
        *("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
        *("r", "hira_dropout"),
    )

    hira_A: nn.Parameter
    hira_B: nn.Parameter
    hira_embedding_A: nn.Parameter
    hira_embedding_B: nn.Parameter

    def __init__(self, layer: LinearMap, r: int, dropout: float, init: bool | str | None) -> None:
        super().__init__()
        self.r, self.embedding = r, layer.kind == "embedding"
        self.hira_dropout = input_dropout(layer, dropout)
        down = layer.down_shape(r)
        A, B = torch.randn(down), torch.randn(layer.out_features, r, *[1] * (len(down) - 2))
        if not init:
            self.identity_at_birth = "init_weights=False draws both factors"
        elif self.embedding:  # as PEFT: one side of the product is zero, here it is A
            nn.init.zeros_(A)
        else:
            nn.init.normal_(A, std=1 / r) if init == "gaussian" else nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            nn.init.zeros_(B)
        own, other = ("hira_embedding", "hira") if self.embedding else ("hira", "hira_embedding")
        for name, factor in (("A", A), ("B", B)):  # files call the factors of an embedding by names of their own
            self.register_parameter(f"{own}_{name}", nn.Parameter(factor))
            self.register_parameter(f"{other}_{name}", None)

    @classmethod
    def build(cls, layer: LinearMap, config: HiraConfig, path: str) -> HiRA:
        r = pattern_value(config.rank_pattern, path, config.r)
        return cls(layer, r, config.hira_dropout, config.init_weights)

    @property
    def A(self) -> Tensor:
        return (self.hira_embedding_A if self.embedding else self.hira_A).flatten(1)

    @property
    def B(self) -> Tensor:
        return (self.hira_embedding_B if self.embedding else self.hira_B).flatten(1)

    def update(self, weight: Tensor) -> Tensor:
        return weight * (self.B @ self.A)

    def adapt(self, weight: Tensor) -> Tensor:
        return weight + self.update(weight)

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        """W * (B A) is no product of small factors, and r scaled copies of x through W would cost r layers.

        So the matrix is built, except where rows of it are looked up.
        """
        if self.embedding:
            y = layer(x)
            return y + y * F.linear(F.embedding(x, self.A.T).to(y.dtype), self.B.to(y.dtype))
        dropping = self.training and isinstance(self.hira_dropout, nn.Dropout)
        if layer.dtype.itemsize >= 4 and not dropping:
            return super().forward(x, layer)
        y = layer(x)  # W + W * (B A) in half precision would round most of the change away
        return y + layer.apply(self.hira_dropout(x), self.update(layer.weight)).to(y.dtype)


METHOD = Method(
    PeftType.HIRA,
    HiraConfig,
    HiRA,
    key_prefix="hira_",
    default_targets=usual_targets,
    train_options=all_linear,
    pairs="hira",
)
