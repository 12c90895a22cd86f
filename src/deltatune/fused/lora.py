"""LoRA on experts: W_e' = W_e + (alpha / r) B_e A_e for each expert e.   https://arxiv.org/abs/2106.09685

Files keep the factors of all experts in two matrices: A (E r, in), expert after expert, and B (out, r E), in which the
columns of one expert are E apart.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.adapter import Adapter
from deltatune.bases.experts import Experts
from deltatune.errors import ConfigError
from deltatune.factors import Factor
from deltatune.lora import parameters
from deltatune.patterns import pattern_value


class ExpertLoRA(Adapter):
    """Trainable: A_e (r, in) and B_e (out, r) for E experts, r E (in + out) numbers."""

    base_kinds: ClassVar[frozenset[str]] = frozenset({"experts"})
    views: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "scaling", "r", "lora_alpha", "use_rslora")

    lora_A: Factor
    lora_B: Factor

    def __init__(self, layer: Experts, r: int, alpha: float, rslora: bool, init: bool | str) -> None:
        super().__init__()
        self.r, self.lora_alpha, self.use_rslora, self.count = r, alpha, rslora, layer.count
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        self.lora_A, self.lora_B = Factor(*layer.down_shape(r)), Factor(*layer.up_shape(r))
        if init is False:
            self.identity_at_birth = "init_lora_weights=False draws both factors"
        self._start(init)

    @classmethod
    def build(cls, layer: Any, config: Any, path: str) -> ExpertLoRA:
        """`path` is that of the parameter."""
        parameters.check(config, path)
        r = pattern_value(config.rank_pattern, path, config.r)
        alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
        if r > max(layer.in_features, layer.out_features):
            raise ConfigError(
                f"LoraConfig: r={r} is larger than both sides of the matrices in {path} ({layer.out_features}, "
                f"{layer.in_features}); use at most {min(layer.in_features, layer.out_features)}",
                field="r",
                path=path,
                found=r,
                expected=max(layer.in_features, layer.out_features),
            )
        init = True if config.init_lora_weights is None else config.init_lora_weights
        return cls(layer, r, alpha, config.use_rslora, init)

    def _start(self, init: bool | str) -> None:
        A, B = self.lora_A.weight, self.lora_B.weight
        if init == "gaussian":
            nn.init.normal_(A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if init is False:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))
        else:
            nn.init.zeros_(B)

    @property
    def A(self) -> Tensor:
        """(E, r, in)"""
        return self.lora_A.weight.unflatten(0, (self.count, self.r))

    @property
    def B(self) -> Tensor:
        """(E, out, r)"""
        return self.lora_B.weight.unflatten(1, (self.r, self.count)).permute(2, 0, 1)

    def adapt(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, self.lora_A.weight.dtype)
        return weight + self.scaling * (self.B @ self.A).to(wide)

    def factors(self, layer: Experts) -> tuple[Tensor, Tensor]:
        """L and R of the update L R, in the layout of the parameter."""
        A, B = self.A, self.scaling * self.B
        if layer.stored.ndim == 2:
            return B[0], A[0]
        return (A.mT, B.mT) if layer.turned else (B, A)

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, experts={self.count}"
