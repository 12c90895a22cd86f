"""DeLoRA: W' = W + (lambda / r) sum_i (b_i / |b_i|) (a_i / |a_i|)^T diag(|W_:j|).   https://arxiv.org/abs/2503.18225"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import biases, checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets
from deltatune.config import PeftType, config
from deltatune.factors import input_dropout
from deltatune.methods.common import LayerConfig, all_linear
from deltatune.patterns import pattern_value

SHORTEST = 1e-4  # no vector is divided by less, as in PEFT


@config
class DeloraConfig(LayerConfig):
    """DeLoRA's options, with PEFT's names and defaults.

    Attributes:
        r: Number of rank-one terms.
        delora_lambda: Start of lambda: the norm of the change, relative to the norms of W's columns, is at most lambda.
        module_dropout: Dropout on the input of the change, in training.
        init_weights: True: A uniform (Kaiming), B zero. False: both random, so that a fresh adapter changes the output.
        rank_pattern: Layer name or regular expression -> another rank; `lambda_pattern` likewise.
    """

    r: int = 8
    delora_lambda: int | float = 15
    module_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool = True
    rank_pattern: dict = field(default_factory=dict)
    lambda_pattern: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.peft_type = PeftType.DELORA
        self.rank_pattern, self.lambda_pattern = self.rank_pattern or {}, self.lambda_pattern or {}
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("DeloraConfig", "r", self.r)
        checks.finite_positive("DeloraConfig", "delora_lambda", self.delora_lambda)
        checks.probability("DeloraConfig", "module_dropout", self.module_dropout)
        biases.check("DeloraConfig", self.bias, "delora_only")


class DeLoRA(Adapter):
    """Trainable: A (r, in) with rows a_i, B (out, r) with columns b_i, and lambda. Frozen: the norms of W's columns.

    PEFT's files hold these norms (in). Ours leave them out, since the base weight gives them again.
    """

    stacks = ("r",)
    views: ClassVar[tuple[str, ...]] = (
        *("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
        *("r", "delora_dropout"),
    )

    delora_w_norm: Tensor

    def __init__(self, layer: LinearMap, r: int, bound: float, dropout: float, start_at_zero: bool) -> None:
        super().__init__()
        self.r = r
        self.delora_dropout = input_dropout(layer, dropout)
        self.delora_A = nn.Parameter(torch.empty(r, layer.in_features))
        self.delora_B = nn.Parameter(torch.zeros(layer.out_features, r))
        self.delora_lambda = nn.Parameter(torch.full((1,), float(bound)))
        nn.init.kaiming_uniform_(self.delora_A, a=math.sqrt(5))
        if not start_at_zero:
            self.identity_at_birth = "init_weights=False draws both factors"
            nn.init.kaiming_uniform_(self.delora_B, a=math.sqrt(5))
        weight = layer.weight.detach()
        norms = weight.to(torch.promote_types(weight.dtype, torch.float32)).norm(dim=0)
        self.register_buffer("delora_w_norm", norms, persistent=False)

    @classmethod
    def build(cls, layer: LinearMap, config: DeloraConfig, path: str) -> DeLoRA:
        r = pattern_value(config.rank_pattern, path, config.r)
        bound = pattern_value(config.lambda_pattern, path, config.delora_lambda)
        return cls(layer, r, bound, config.module_dropout, config.init_weights)

    def derived_tensors(self) -> dict[str, Tensor]:
        return {"delora_w_norm": self.delora_w_norm}

    @property
    def scaling(self) -> Tensor:
        """(r,): what makes of A's rows and B's columns unit vectors times lambda / r."""
        a, b = self.delora_A.norm(dim=-1).clamp_min(SHORTEST), self.delora_B.norm(dim=-2).clamp_min(SHORTEST)
        return self.delora_lambda / self.r / (a * b)

    @property
    def down(self) -> Tensor:
        """(r, in): A for an input weighted by the norms of the columns."""
        return self.delora_A * self.delora_w_norm[..., None, :]

    def adapt(self, weight: Tensor) -> Tensor:
        return weight + (self.delora_B * self.scaling) @ self.down

    def low_rank(self, layer: LinearMap) -> tuple[Tensor, Tensor]:
        return self.delora_B * self.scaling, self.down

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        y = layer(x)
        x = self.delora_dropout(x)
        h = layer.scale(layer.apply(x, self.down), self.scaling)
        return y + layer.mix(h, self.delora_B).to(y.dtype)

    def extra_repr(self) -> str:
        return f"r={self.r}"


METHOD = Method(
    PeftType.DELORA,
    DeloraConfig,
    DeLoRA,
    key_prefix="delora_",
    default_targets=usual_targets,
    learning_rate=3e-3,  # of directions, which a step turns by rate x sqrt(width) / length; PEFT's example has it too
    train_options=all_linear,
)
