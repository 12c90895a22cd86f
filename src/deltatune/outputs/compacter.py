"""Compacter: h' = h + s (U f(D h + b) + c), with D and U sums of n Kronecker products A_i (x) s_i t_i^T.

The A_i are the same in all layers (parametrised hypercomplex layers), s_i and t_i are thin.
https://arxiv.org/abs/2106.04647
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Adapter, LinearMap, Method, Stored
from deltatune.config import PeftType, config
from deltatune.methods.common import LayerConfig
from deltatune.outputs.bottleneck import BENT, behind_each_layer, shifted


@config
class CompacterConfig(LayerConfig):
    """Compacter's options.

    Attributes:
        phm_dim: n, the number of Kronecker products and the side of each A_i; it divides the outputs of a layer.
        phm_rank: Columns of s_i and of t_i.
        reduction_factor: How many times narrower than the layer's output the bottleneck is, about: n divides its width.
        non_linearity: "relu", "gelu", "swish" or "tanh".
        scaling: Factor s.
        dropout: Share of the bottleneck's numbers that are set to zero, in training.
        init_weights: True starts at zero change, False at random.
    """

    phm_dim: int = 4
    phm_rank: int = 1
    reduction_factor: float = 32.0
    non_linearity: str = "gelu"
    scaling: float = 1.0
    dropout: float = 0.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.COMPACTER
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("CompacterConfig", "phm_dim", self.phm_dim)
        checks.positive_int("CompacterConfig", "phm_rank", self.phm_rank)
        checks.finite_positive("CompacterConfig", "reduction_factor", self.reduction_factor)
        checks.one_of("CompacterConfig", "non_linearity", self.non_linearity, tuple(BENT))
        checks.finite_positive("CompacterConfig", "scaling", self.scaling)
        checks.probability("CompacterConfig", "dropout", self.dropout)


class Rules(Stored):
    """Trainable and common to all layers: A_1 .. A_n as (n, n, n)."""

    def __init__(self, layers: dict[str, LinearMap], config: CompacterConfig) -> None:
        super().__init__()
        self.compacter_A = nn.Parameter(torch.randn(config.phm_dim, config.phm_dim, config.phm_dim))
        nn.init.normal_(self.compacter_A, std=config.phm_dim**-0.5)


class Hypercomplex(nn.Module):
    """Trainable: s (n, out / n, rank), t (n, rank, in / n) and a bias (out)."""

    def __init__(self, out: int, width: int, n: int, rank: int, zero: bool) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.zeros(n, out // n, rank) if zero else torch.randn(n, out // n, rank))
        self.t = nn.Parameter(torch.randn(n, rank, width // n) * (3 * width * rank) ** -0.5)  # W as nn.Linear's
        self.bias = nn.Parameter(torch.zeros(out))

    def matrix(self, A: Tensor) -> Tensor:
        """(out, in): entry (p, a; q, b) is sum_i A_i[p, q] (s_i t_i)[a, b]."""
        return torch.einsum("ipq,iar,irb->paqb", A, self.s, self.t).flatten(2).flatten(0, 1)


class Compacter(Adapter):
    """Trainable: D and U without their A_i, and their biases."""

    base_kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "conv", "block"})
    mergeable: bool | str = "it bends what it adds"
    views: ClassVar[tuple[str, ...]] = ("compacter_down", "compacter_up", "scaling")

    def __init__(self, width: int, size: int, config: CompacterConfig) -> None:
        super().__init__()
        self.bend, self.scaling = config.non_linearity, config.scaling
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.compacter_down = Hypercomplex(size, width, config.phm_dim, config.phm_rank, zero=False)
        self.compacter_up = Hypercomplex(width, size, config.phm_dim, config.phm_rank, zero=config.init_weights)
        if not config.init_weights:
            self.identity_at_birth = "init_weights=False draws all factors"

    @classmethod
    def build(cls, layer: LinearMap, config: CompacterConfig, path: str, shared: Rules) -> Compacter:
        n, width = config.phm_dim, layer.out_features
        checks.divisor("CompacterConfig", "phm_dim", n, width, f"the {width} outputs of {path}", path)
        return cls(width, n * max(1, int(width / config.reduction_factor / n)), config)

    def forward(self, x: Any, layer: LinearMap, **values: Any) -> Tensor:
        y, A = layer(x), self.shared.compacter_A
        down, up = self.compacter_down, self.compacter_up
        narrow = BENT[self.bend](shifted(layer, layer.mix(y, down.matrix(A)), down.bias))
        wide = shifted(layer, layer.mix(self.dropout(narrow), up.matrix(A)), up.bias)
        return y + (self.scaling * wide).to(y.dtype)

    def extra_repr(self) -> str:
        return f"non_linearity={self.bend}, scaling={self.scaling:g}"


METHOD = Method(
    PeftType.COMPACTER,
    CompacterConfig,
    Compacter,
    key_prefix="compacter_",
    default_targets=behind_each_layer,
    shared=Rules,
    learning_rate=3e-3,
)
