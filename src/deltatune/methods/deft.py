"""DEFT: W' = (I - Q N^T) W + (alpha / r) Q R, a subspace of the outputs taken out of W and filled anew.

https://arxiv.org/abs/2509.22793, and without R: PaRa, https://arxiv.org/abs/2406.05641
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import biases, checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets
from deltatune.config import PeftType, config
from deltatune.factors import input_dropout
from deltatune.methods.common import LayerConfig, all_linear


@config
class DeftConfig(LayerConfig):
    """DEFT's options, with PEFT's names and defaults.

    Attributes:
        r: Dimension of the subspace; in a layer with fewer outputs that many.
        decomposition_method: What Q and N are. "relu": Q = P, N = relu(P). "qr": both are an orthonormal basis of P's
            columns, so that the subspace is projected out exactly.
        alpha: R is scaled by alpha / r; None: not scaled.
        para: PaRa: the subspace is taken out and nothing put in its place. Then a fresh adapter changes the output.
        deft_dropout: Dropout on the input of R, in training.
        init_weights: True: R = N^T W, which puts back what is taken out. False: R ~ N(0, 0.02 `init_scale`).
        fan_in_fan_out: Accepted and ignored: how a layer stores its weight is read off the layer.
    """

    r: int = 8
    decomposition_method: str = "relu"
    init_scale: float = 1.0
    alpha: int | float | None = None
    para: bool = False
    fan_in_fan_out: bool = False
    deft_dropout: float = 0.0
    init_weights: bool = True
    bias: str = "none"

    def __post_init__(self) -> None:
        self.peft_type = PeftType.DEFT
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("DeftConfig", "r", self.r)
        checks.one_of("DeftConfig", "decomposition_method", self.decomposition_method, ("relu", "qr"))
        checks.finite_positive("DeftConfig", "init_scale", self.init_scale)
        if self.alpha is not None:
            checks.finite_positive("DeftConfig", "alpha", self.alpha)
        checks.probability("DeftConfig", "deft_dropout", self.deft_dropout)
        biases.check("DeftConfig", self.bias, "deft_only")


class DEFT(Adapter):
    """Trainable: P (out, r), which spans the subspace, and R (r, in), what is put there."""

    bounded_r: ClassVar[bool] = False
    views: ClassVar[tuple[str, ...]] = ("deft_P", "deft_R", "deft_r", "deft_scaling", "deft_dropout")
    deft_R: nn.Parameter | None

    def __init__(self, layer: LinearMap, config: DeftConfig) -> None:
        super().__init__()
        self.deft_r = r = min(config.r, layer.out_features)
        self.deft_scaling = config.alpha / r if config.alpha else 1.0
        self.orthonormal = config.decomposition_method == "qr"
        self.deft_dropout = input_dropout(layer, config.deft_dropout)
        self.deft_P = nn.Parameter(0.02 * torch.randn(layer.out_features, r))
        self.deft_R = None if config.para else nn.Parameter(self._start(layer, config))
        if config.para:
            self.identity_at_birth = "para=True takes a subspace out and puts nothing in"
        elif not config.init_weights:
            self.identity_at_birth = "init_weights=False draws R"

    @classmethod
    def build(cls, layer: LinearMap, config: DeftConfig, path: str) -> DEFT:
        return cls(layer, config)

    @torch.no_grad()
    def _start(self, layer: LinearMap, config: DeftConfig) -> Tensor:
        if not config.init_weights:
            return 0.02 * config.init_scale * torch.randn(self.deft_r, layer.in_features)
        W = layer.weight.to(torch.promote_types(layer.dtype, torch.float32))
        P = self.deft_P.to(W)
        return self.factors(P)[1].T @ W / self.deft_scaling

    def factors(self, P: Tensor) -> tuple[Tensor, Tensor]:
        """Q and N, (out, r) both."""
        if not self.orthonormal:
            return P, P.relu()
        Q = torch.linalg.qr(P.to(torch.promote_types(P.dtype, torch.float32)))[0].to(P.dtype)
        return Q, Q

    def adapt(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, self.deft_P.dtype)
        Q, N = (factor.to(wide) for factor in self.factors(self.deft_P))
        weight = weight.to(wide)
        change = -(N.T @ weight)
        if self.deft_R is not None:
            change = change + self.deft_scaling * self.deft_R
        return weight + Q @ change

    def low_rank(self, layer: LinearMap) -> tuple[Tensor, Tensor]:
        W, wide = layer.weight, torch.promote_types(layer.dtype, self.deft_P.dtype)
        Q, N = (factor.to(wide) for factor in self.factors(self.deft_P))
        change = -(N.T @ W.to(wide))
        return Q, change if self.deft_R is None else change + self.deft_scaling * self.deft_R

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        y, (Q, N) = layer(x), self.factors(self.deft_P)
        taken = layer.mix(y, N.T)
        if layer.bias is not None:  # y is W x + b, and the subspace is taken out of W x
            ones = torch.ones((), dtype=y.dtype, device=y.device).expand_as(taken)
            taken = taken - layer.scale(ones, layer.bias.to(N.dtype) @ N)
        if self.deft_R is None:
            return y - layer.mix(taken, Q)
        put = self.deft_scaling * layer.apply(self.deft_dropout(x), self.deft_R)
        return y + layer.mix((put - taken).to(y.dtype), Q)

    def extra_repr(self) -> str:
        return f"r={self.deft_r}, scaling={self.deft_scaling:g}"


METHOD = Method(
    PeftType.DEFT, DeftConfig, DEFT, key_prefix="deft_", default_targets=usual_targets, train_options=all_linear
)
