"""KaSA: W' = (W without its r smallest singular values) + (alpha / r) B diag(d) A.   https://arxiv.org/abs/2412.06071"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import LinearMap
from deltatune.errors import ConfigError
from deltatune.factors import at_least_single
from deltatune.lora.variants.options import Options
from deltatune.lora.variants.qalora import DRAWN
from deltatune.lora.variants.variant import Variant

if TYPE_CHECKING:
    from deltatune.methods.lora import LoRA


@dataclass
class KasaConfig(Options):
    """KaSA's options, with PEFT's names and defaults. Both terms are in the loss of a training pass by themselves.

    Attributes:
        beta: Weight of |d|^2 in the loss.
        gamma: Weight of |B^T B - I| + |A A^T - I| in the loss.
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    def validate(self) -> None:
        for name in ("beta", "gamma"):
            value = getattr(self, name)
            if not checks.fits(value, float) or not math.isfinite(value) or value < 0:
                checks.refuse("KasaConfig", name, value, "a finite number of 0 or more")


class Kasa(Variant):
    """Trainable: d (r). Frozen: the r singular components that are left out, so that the base keeps its own weight."""

    field: ClassVar[str] = "kasa_config"
    starts: ClassVar[tuple[Any, ...] | None] = DRAWN
    summand: ClassVar[bool | str] = "it takes something from the layer's own weight"
    identity_at_birth: bool | str = "KaSA leaves out the smallest singular values of the weight"
    penalises: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("lora_diag",)

    left_A: Tensor
    left_B: Tensor

    def __init__(self, weight: Tensor, r: int, beta: float, gamma: float) -> None:
        super().__init__()
        self.beta, self.gamma = beta, gamma
        self.lora_diag = nn.Parameter(torch.randn(r))
        U, S, Vh = torch.linalg.svd(weight.detach().to(at_least_single(weight)), full_matrices=False)
        self.register_buffer("left_A", Vh[-r:].clone(), persistent=False)  # (r, in)
        self.register_buffer("left_B", -U[:, -r:] * S[-r:], persistent=False)  # (out, r)

    @classmethod
    def build(cls, layer: LinearMap, config: Any, path: str, r: int) -> Kasa:
        shorter = min(layer.in_features, layer.out_features)
        if r >= shorter:
            raise ConfigError(
                f"LoraConfig: kasa_config leaves out the r={r} smallest singular values of {path}, which has "
                f"{shorter}; use at most r={shorter - 1}",
                field="r",
                path=path,
                found=r,
                expected=shorter - 1,
            )
        options: KasaConfig = config.kasa_config
        return cls(layer.weight, r, options.beta, options.gamma)

    def down(self, A: Tensor) -> Tensor:
        return self.lora_diag[:, None] * A

    def frozen(self) -> tuple[Tensor, Tensor]:
        return self.left_A, self.left_B

    def penalty(self, lora: LoRA) -> Tensor:
        """Equations (9) to (11), of A without d."""
        A, B = lora.lora_A.matrix, lora.B
        for variant in lora.variants:
            A = A if variant is self else variant.down(A)
        return self.beta * self.lora_diag.square().sum() + self.gamma * (_skew(A @ A.T) + _skew(B.T @ B))


def _skew(gram: Tensor) -> Tensor:
    """How far vectors are from orthonormal, given their products with each other."""
    return (gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)).norm()
