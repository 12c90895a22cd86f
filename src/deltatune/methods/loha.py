"""LoHa: W' = W + (alpha / r) (A1 B1) * (A2 B2), elementwise.   https://arxiv.org/abs/2108.06098, /2309.14859"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets
from deltatune.config import PeftType, config
from deltatune.factors import RowDropout, block_diagonal, tucker
from deltatune.methods.common import LycorisConfig, all_linear
from deltatune.patterns import pattern_value


@config
class LoHaConfig(LycorisConfig):
    """LoHa's options, with PEFT's names and defaults; most are explained at `LycorisConfig`.

    Attributes:
        init_weights: True: three factors uniform (Kaiming), B2 zero. False: all random, so that a fresh adapter changes
            the output.
    """

    init_weights: bool = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LOHA
        super().__post_init__()


class LoHa(Adapter):
    """Trainable: A1, A2 (out, r) and B1, B2 (r, in); of an effective convolution A1, A2 (r, out), B1, B2 (r, channels)
    and the cores t1, t2 (r, r, kernel)."""

    views: ClassVar[tuple[str, ...]] = (
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        *("scaling", "r", "alpha", "rank_dropout", "module_dropout"),
    )

    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter
    hada_t1: nn.Parameter | None
    hada_t2: nn.Parameter | None

    def __init__(
        self, layer: LinearMap, r: int, alpha: float, dropout: RowDropout, effective: bool, start_at_zero: bool
    ) -> None:
        super().__init__()
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.scaling = self.configured_scaling = alpha / r
        self.embedding, self.groups = layer.kind == "embedding", layer.groups
        inner = layer.in_features // layer.groups
        up, down, core = (layer.out_features, r), (r, inner), None
        if effective and layer.kernel > 1:
            sizes = layer.down_shape(1)[2:]
            core = (r, r, *(sizes if len(sizes) > 1 else (*sizes, 1)))  # PEFT's shape for a Conv1d
            up, down = (r, layer.out_features), (r, inner // layer.kernel)
        for index in (1, 2):
            self.register_parameter(f"hada_w{index}_a", nn.Parameter(torch.empty(up)))
            self.register_parameter(f"hada_w{index}_b", nn.Parameter(torch.empty(down)))
            self.register_parameter(f"hada_t{index}", None if core is None else nn.Parameter(torch.empty(core)))
        self._start(start_at_zero)
        # x can go through the r^2 rows and columns that make up the product; too many cost more than the matrix
        out, width = layer.out_features, layer.in_features
        self.through_factors = core is None and layer.groups == 1 and r * r * (out + width) < out * width

    def _start(self, at_zero: bool) -> None:
        if not at_zero:
            self.identity_at_birth = "init_weights=False draws all factors"
        cores = (self.hada_t1, self.hada_t2)  # last, as in PEFT: equal seeds give equal adapters
        for factor in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b, *cores):
            if factor is self.hada_w2_b and at_zero:
                nn.init.zeros_(self.hada_w2_b)
            elif factor is not None:
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5))  # as FedPara

    @classmethod
    def build(cls, layer: LinearMap, config: LoHaConfig, path: str) -> LoHa:
        r = pattern_value(config.rank_pattern, path, config.r)
        alpha = pattern_value(config.alpha_pattern, path, config.alpha)
        dropout = RowDropout(config.rank_dropout, config.module_dropout, rescale=True)
        return cls(layer, r, alpha, dropout, config.use_effective_conv2d, config.init_weights)

    @property
    def rank_dropout(self) -> float:
        return self.dropout.features

    @property
    def module_dropout(self) -> float:
        return self.dropout.whole

    @property
    def update(self) -> Tensor:
        """W' - W, (out, in)."""
        A1, B1, A2, B2 = self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b
        if self.hada_t1 is None or self.hada_t2 is None:
            product = (A1 @ B1) * (A2 @ B2)
        else:
            product = (tucker(self.hada_t1, A1, B1) * tucker(self.hada_t2, A2, B2)).flatten(1)
        return block_diagonal(self.scaling * product, self.groups)

    def adapt(self, weight: Tensor) -> Tensor:
        return weight + self.update

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        y = layer(x)
        return y + self.dropout(self._updated(x, layer), layer).to(y.dtype)

    def _updated(self, x: Any, layer: LinearMap) -> Tensor:
        """(W' - W) x. Entry (o, i) of the product is sum_jk (A1[o,j] A2[o,k]) (B1[j,i] B2[k,i])."""
        A1, B1, A2, B2 = self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b
        if self.embedding:  # of one column only
            first, second = layer.mix(layer.apply(x, B1), A1), layer.mix(F.embedding(x, B2.T).to(layer.dtype), A2)
            return self.scaling * first * second
        if not self.through_factors:
            return layer.apply(x, self.update)
        rows = (B1[:, None] * B2).flatten(0, 1)  # (r^2, in)
        columns = (A1[:, :, None] * A2[:, None]).flatten(1)  # (out, r^2)
        return self.scaling * layer.mix(layer.apply(x, rows), columns)


METHOD = Method(
    PeftType.LOHA,
    LoHaConfig,
    LoHa,
    key_prefix="hada_",
    default_targets=usual_targets,
    learning_rate=5e-3,
    train_options=all_linear,
)
