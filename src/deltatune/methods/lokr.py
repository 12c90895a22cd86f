"""LoKr: W' = W + (alpha / r) w1 (x) w2, a Kronecker product.   https://arxiv.org/abs/2309.14859, section 3.3"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets
from deltatune.config import PeftType, config
from deltatune.factors import RowDropout, block_diagonal, scale_of_rows, tucker
from deltatune.methods.common import LycorisConfig, all_linear
from deltatune.patterns import pattern_value


@config
class LoKrConfig(LycorisConfig):
    """LoKr's options, with PEFT's names and defaults; most are explained at `LycorisConfig`.

    Attributes:
        r: w2 is a product of rank r, or a full matrix where r is at least half of its longer side.
        decompose_factor: Side of w1 where it divides the layer's; otherwise that is the largest divisor up to it and to
            the square root, -1 meaning the square root alone.
        decompose_both: w1 is a product of rank r too, unless r is at least half of its longer side.
        rank_dropout_scale: Scale up what `rank_dropout` keeps.
        init_weights: True: w1 is zero (of a product its outer factor). "lycoris": w2 is zero (its inner factor). False:
            all random, so that a fresh adapter changes the output.
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LOKR
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.one_of("LoKrConfig", "init_weights", self.init_weights, (True, False, "lycoris"))
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            checks.refuse("LoKrConfig", "decompose_factor", self.decompose_factor, "-1 or an integer of 1 or more")


class LoKr(Adapter):
    """Trainable: w1 (p, m) and w2 (q, n, kernel) with p q = out and m n = channels, each perhaps a product of rank r.

    Products are w1_a (p, r), w1_b (r, m) and w2_a (q, r), w2_b (r, n kernel); of an effective convolution w2_a (r, q),
    w2_b (r, n) and a core t2 (r, r, kernel).
    """

    bounded_r: ClassVar[bool] = False
    views: ClassVar[tuple[str, ...]] = (
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        *("scaling", "r", "alpha", "rank_dropout", "module_dropout", "rank_dropout_scale"),
    )

    lokr_w1: nn.Parameter | None
    lokr_w1_a: nn.Parameter
    lokr_w1_b: nn.Parameter
    lokr_w2: nn.Parameter | None
    lokr_w2_a: nn.Parameter
    lokr_w2_b: nn.Parameter
    lokr_t2: nn.Parameter | None

    def __init__(self, layer: LinearMap, r: int, alpha: float, dropout: RowDropout, config: LoKrConfig) -> None:
        super().__init__()
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.scaling = self.configured_scaling = alpha / r
        self.kind, self.groups, self.out_features = layer.kind, layer.groups, layer.out_features
        sizes = layer.down_shape(1)[2:]
        p, q = sides(layer.out_features, config.decompose_factor)
        m, n = sides(layer.in_features // layer.kernel // layer.groups, config.decompose_factor)
        shapes: dict[str, tuple[int, ...]] = {}
        if config.decompose_both and r < max(p, m) / 2:
            shapes.update(w1_a=(p, r), w1_b=(r, m))
        else:
            shapes.update(w1=(p, m))
        if r >= max(q, n) / 2:
            shapes.update(w2=(q, n, *sizes))
        elif config.use_effective_conv2d and layer.kernel > 1:
            core = sizes if len(sizes) > 1 else (*sizes, 1)  # PEFT's shape for a Conv1d
            shapes.update(w2_a=(r, q), w2_b=(r, n), t2=(r, r, *core))
        else:
            shapes.update(w2_a=(q, r), w2_b=(r, n * layer.kernel))
        for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"):
            made = nn.Parameter(torch.empty(shapes[name])) if name in shapes else None
            self.register_parameter(f"lokr_{name}", made)
        self._start(config.init_weights)

    @classmethod
    def build(cls, layer: LinearMap, config: LoKrConfig, path: str) -> LoKr:
        r = pattern_value(config.rank_pattern, path, config.r)
        alpha = pattern_value(config.alpha_pattern, path, config.alpha)
        dropout = RowDropout(config.rank_dropout, config.module_dropout, config.rank_dropout_scale)
        return cls(layer, r, alpha, dropout, config)

    def _start(self, init: bool | str) -> None:
        zero = None
        if init is True:
            zero = self.lokr_w1 if self.lokr_w1 is not None else self.lokr_w1_a
        elif init == "lycoris":
            zero = self.lokr_w2 if self.lokr_w2 is not None else self.lokr_w2_b
        else:
            self.identity_at_birth = "init_weights=False draws all factors"
        for factor in self.parameters():
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5)) if factor is not zero else nn.init.zeros_(factor)

    @property
    def rank_dropout(self) -> float:
        return self.dropout.features

    @property
    def module_dropout(self) -> float:
        return self.dropout.whole

    @property
    def rank_dropout_scale(self) -> bool:
        return self.dropout.rescale

    @property
    def w1(self) -> tuple[Tensor, ...]:
        """(p, m) as one matrix, or as the factors of one: the one that reads the input, then the other."""
        return (self.lokr_w1_b, self.lokr_w1_a) if self.lokr_w1 is None else (self.lokr_w1,)

    @property
    def w2(self) -> tuple[Tensor, ...]:
        """(q, n kernel) likewise."""
        if self.lokr_t2 is not None:
            return (tucker(self.lokr_t2, self.lokr_w2_a, self.lokr_w2_b).flatten(1),)
        return (self.lokr_w2_b, self.lokr_w2_a) if self.lokr_w2 is None else (self.lokr_w2,)

    @property
    def update(self) -> Tensor:
        """W' - W, (out, in)."""
        w1, w2 = (reduce(lambda inner, outer: outer @ inner, factors) for factors in (self.w1, self.w2))
        # kron takes the (q, n, kernel) of a Conv1d for a stack of matrices; that order is the meaning of PEFT's files
        product = torch.kron(w1, w2 if w2.ndim == 3 else w2.flatten(1)).reshape(self.out_features, -1)
        return block_diagonal(self.scaling * product, self.groups)

    def adapt(self, weight: Tensor) -> Tensor:
        return weight + self.update

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        y = layer(x)
        updated = {"linear": self._of_vectors, "embedding": self._of_indices}.get(self.kind)
        update = layer.apply(x, self.update) if updated is None else self.scaling * updated(x, layer)
        return y + self.dropout(update, layer).to(y.dtype)

    def _of_vectors(self, x: Tensor, layer: LinearMap) -> Tensor:
        """(w1 (x) w2) x = w1 X w2^T, with x written as a matrix X (m, n)."""
        h = x.unflatten(-1, (self.w1[0].shape[1], self.w2[0].shape[1]))
        for factor in self.w2:
            h = _linear(h, factor)
        h = h.mT.contiguous()  # so that it takes the same path with and without gradients
        for factor in self.w1:
            h = _linear(h, factor)
        return h.mT.flatten(-2)

    def _of_indices(self, x: Tensor, layer: LinearMap) -> Tensor:
        """Column i of w1 (x) w2 is column i // n of w1 (x) column i % n of w2."""
        n = self.w2[0].shape[1]
        first, second = (
            reduce(_linear, factors[1:], F.embedding(index, factors[0].T).to(layer.dtype))
            for factors, index in ((self.w1, x // n), (self.w2, x % n))
        )
        return scale_of_rows(x, layer, first.dtype) * (first[..., :, None] * second[..., None, :]).flatten(-2)


def _linear(h: Tensor, factor: Tensor) -> Tensor:
    return F.linear(h, factor.to(h.dtype))


def sides(size: int, factor: int = -1) -> tuple[int, int]:
    """Two sides whose product is `size`, the first near `factor`, or near the square root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = min(math.isqrt(size), factor) if factor > 0 else math.isqrt(size)
    first = max(divisor for divisor in range(1, limit + 1) if size % divisor == 0)
    return first, size // first


METHOD = Method(
    PeftType.LOKR,
    LoKrConfig,
    LoKr,
    key_prefix="lokr_",
    default_targets=usual_targets,
    learning_rate=2e-3,
    train_options=all_linear,
)
