"""HRA: W' = W H_1 ... H_r with Householder reflections H_i = I - 2 u_i u_i^T.   https://arxiv.org/abs/2405.17484"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import biases, checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError
from deltatune.factors import orthonormal, reflect
from deltatune.methods.common import LayerConfig, all_linear


@config
class HRAConfig(LayerConfig):
    """HRA's options, with PEFT's names and defaults.

    Attributes:
        r: Number of reflections; an even number starts as the identity, because equal neighbours cancel.
        apply_GS: Make the u_i orthonormal by Gram-Schmidt. Equal neighbours cannot be, so a fresh adapter then changes
            the output.
        init_weights: True as above; False random.
    """

    r: int = 8
    apply_GS: bool = False
    init_weights: bool = True
    bias: str = "none"

    def __post_init__(self) -> None:
        self.peft_type = PeftType.HRA
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("HRAConfig", "r", self.r)
        biases.check("HRAConfig", self.bias, "hra_only")


class Reflections(Adapter):
    """Trainable: the vectors u_i as the columns of a matrix (in, r)."""

    base_kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    views: ClassVar[tuple[str, ...]] = ("hra_u", "hra_r")

    def __init__(self, layer: LinearMap, r: int, gram_schmidt: bool, symmetric: bool) -> None:
        super().__init__()
        self.hra_r, self.gram_schmidt, self.vectors_in = r, gram_schmidt, layer.kind == "linear"
        if not symmetric:
            self.identity_at_birth = "equal neighbours, which would cancel, were not asked for or are not possible"
        u = torch.empty(layer.in_features, r // 2 if symmetric else r)
        nn.init.kaiming_uniform_(u, a=math.sqrt(5))
        self.hra_u = nn.Parameter(u.repeat_interleave(2, dim=1) if symmetric else u)

    @classmethod
    def build(cls, layer: LinearMap, config: HRAConfig, path: str) -> Reflections:
        if config.apply_GS and config.r > layer.in_features:
            raise ConfigError(
                f"HRAConfig: r={config.r} orthonormal vectors do not fit in the {layer.in_features} inputs of {path}",
                field="r",
                found=config.r,
                expected=layer.in_features,
            )
        symmetric = config.init_weights and config.r % 2 == 0 and not config.apply_GS
        return cls(layer, config.r, config.apply_GS, symmetric)

    @property
    def U(self) -> Tensor:
        return orthonormal(self.hra_u) if self.gram_schmidt else self.hra_u / self.hra_u.norm(dim=0)

    def adapt(self, weight: Tensor) -> Tensor:
        weight = weight.to(torch.promote_types(weight.dtype, self.hra_u.dtype))
        for u in self.U.unbind(1):
            weight = reflect(weight, u)
        return weight

    def low_rank(self, layer: LinearMap) -> tuple[Tensor, Tensor]:
        U = self.U
        Y = U.new_zeros(len(U), 0)  # H_1 ... H_k = I + Y U_k^T
        for k, u in enumerate(U.unbind(1)):
            Y = torch.cat([Y, -2 * (u + Y @ (U[:, :k].T @ u))[:, None]], 1)
        return layer.weight.to(torch.promote_types(layer.dtype, U.dtype)) @ Y, U.T

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        if not self.vectors_in:  # a patch of an image is no vector that could be reflected before the layer
            return super().forward(x, layer)
        # x (W H_1 ... H_r)^T = (x H_r ... H_1) W^T; reflecting x costs r (in), the chain of matrices r (in x in)
        for u in reversed(self.U.to(x.dtype).unbind(1)):
            x = reflect(x, u)
        return layer(x)


METHOD = Method(
    PeftType.HRA, HRAConfig, Reflections, key_prefix="hra_", default_targets=usual_targets, train_options=all_linear
)
