"""VeRA: W' = W + diag(b) B diag(d) A, with random A and B that all layers share.   https://arxiv.org/abs/2310.11454"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import biases, checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets as loras_targets
from deltatune.config import PeftType, config
from deltatune.factors import input_dropout
from deltatune.methods.common import LayerConfig, all_linear
from deltatune.projections import Projections


@config
class VeraConfig(LayerConfig):
    """VeRA's options, with PEFT's names and meaning; of the defaults `save_projection` differs.

    Attributes:
        r: Rank of the update. It may exceed the sides of a layer: r numbers train where LoRA trains r (in + out).
        projection_prng_key: Seed of A and B.
        save_projection: Files hold A and B. Without, they hold a checksum, and A and B are drawn again on loading.
        vera_dropout: Dropout on the input of A, in training.
        d_initial: Start of d; that of b is zero.
        init_weights: True as above; False: b ones and d random, so that a fresh adapter changes the output.
        fan_in_fan_out: Accepted and ignored: how a layer stores its weight is read off the layer.
    """

    beyond_peer: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})
    file_defaults: ClassVar[dict[str, Any]] = {"save_projection": True}

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = False
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.VERA
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("VeraConfig", "r", self.r)
        checks.probability("VeraConfig", "vera_dropout", self.vera_dropout)
        biases.check("VeraConfig", self.bias, "vera_only")


def projections(layers: dict[str, LinearMap], config: VeraConfig) -> Projections:
    seed, keep = config.projection_prng_key, config.save_projection
    return Projections(layers, "vera", rows=config.r, r=config.r, seed=seed, keep=keep)


class Vera(Adapter):
    """Trainable: the vectors b (out) and d (r)."""

    views: ClassVar[tuple[str, ...]] = ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B", "vera_dropout", "r")
    bounded_r: ClassVar[bool] = False

    def __init__(self, layer: LinearMap, config: VeraConfig) -> None:
        super().__init__()
        self.r = config.r
        self.sides = layer.out_features, layer.in_features
        self.vera_dropout = input_dropout(layer, config.vera_dropout)
        self.vera_lambda_b = nn.Parameter(torch.zeros(layer.out_features))
        self.vera_lambda_d = nn.Parameter(torch.full((config.r,), float(config.d_initial)))
        if not config.init_weights:
            self.identity_at_birth = "init_weights=False starts with b = 1"
            nn.init.ones_(self.vera_lambda_b)
            nn.init.normal_(self.vera_lambda_d)

    @classmethod
    def build(cls, layer: LinearMap, config: VeraConfig, path: str, shared: Projections) -> Vera:
        return cls(layer, config)

    @property
    def vera_A(self) -> Tensor:
        return self.shared.corners(self.sides, self.vera_lambda_d.device)[0]

    @property
    def vera_B(self) -> Tensor:
        return self.shared.corners(self.sides, self.vera_lambda_b.device)[1]

    def adapt(self, weight: Tensor) -> Tensor:
        b, d = self.vera_lambda_b[:, None], self.vera_lambda_d[:, None]
        return weight + (b * self.vera_B) @ (d * self.vera_A)

    def low_rank(self, layer: LinearMap) -> tuple[Tensor, Tensor]:
        b, d = self.vera_lambda_b[:, None], self.vera_lambda_d[:, None]
        return b * self.vera_B, d * self.vera_A

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        y = layer(x)
        h = layer.scale(layer.apply(self.vera_dropout(x), self.vera_A), self.vera_lambda_d)
        return y + layer.scale(layer.mix(h, self.vera_B), self.vera_lambda_b).to(y.dtype)

    def extra_repr(self) -> str:
        return f"r={self.r}"


def usual_targets(model_type: str) -> Any:
    return ["q_proj", "v_proj"] if model_type == "phi" else loras_targets(model_type)


METHOD = Method(
    PeftType.VERA,
    VeraConfig,
    Vera,
    key_prefix="vera_",
    default_targets=usual_targets,
    shared=projections,
    learning_rate=4e-3,
    train_options=all_linear,
)
