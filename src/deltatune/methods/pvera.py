"""PVeRA: VeRA with a Gaussian between its projections, h = W x + diag(b) B z.   https://arxiv.org/abs/2512.07703

z ~ N(m, exp(v)), (m, v) = diag(d) A x: sampled in training, z = m otherwise.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import biases, checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.config import PeftType, config
from deltatune.factors import input_dropout
from deltatune.methods.common import LayerConfig, all_linear
from deltatune.methods.vera import usual_targets as veras_targets
from deltatune.projections import Projections


@config
class PveraConfig(LayerConfig):
    """PVeRA's options, with PEFT's names and meaning; of the defaults `save_projection` differs.

    Attributes:
        r: Length of z. It may exceed the sides of a layer.
        projection_prng_key: Seed of A and B.
        save_projection: Files hold A and B. Without, they hold a checksum, and A and B are drawn again on loading.
        pvera_dropout: Dropout on the input of A, in training.
        d_initial: Start of d; that of b is zero.
        init_weights: True as above; False: b ones and d random, so that a fresh adapter changes the output.
        sample_at_inference: Sample z outside of training as well; merging takes the mean all the same.
        generator_seed: Seed of the samples, a generator per layer; None: torch's own.
        fan_in_fan_out: Accepted and ignored: how a layer stores its weight is read off the layer.
    """

    beyond_peer: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})
    file_defaults: ClassVar[dict[str, Any]] = {"save_projection": True}

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = False
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    sample_at_inference: bool = False
    generator_seed: int | None = None

    def __post_init__(self) -> None:
        self.peft_type = PeftType.PVERA
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("PveraConfig", "r", self.r)
        checks.probability("PveraConfig", "pvera_dropout", self.pvera_dropout)
        biases.check("PveraConfig", self.bias, "pvera_only")


def projections(layers: dict[str, LinearMap], config: PveraConfig) -> Projections:
    seed, keep = config.projection_prng_key, config.save_projection
    return Projections(layers, "pvera", rows=2 * config.r, r=config.r, seed=seed, keep=keep)


class Pvera(Adapter):
    """Trainable: the vectors b (out) and d (2 r), of which the first half makes means, the second log-variances."""

    views: ClassVar[tuple[str, ...]] = (
        *("pvera_lambda_b", "pvera_lambda_d", "pvera_A", "pvera_B", "pvera_dropout", "r", "sample_at_inference"),
        "pvera_generator",
    )
    bounded_r: ClassVar[bool] = False

    def __init__(self, layer: LinearMap, config: PveraConfig) -> None:
        super().__init__()
        self.r = config.r
        self.sides = layer.out_features, layer.in_features
        self.pvera_dropout = input_dropout(layer, config.pvera_dropout)
        self.sample_at_inference, self.pvera_generator = config.sample_at_inference, None
        if config.generator_seed is not None:
            self.pvera_generator = torch.Generator().manual_seed(config.generator_seed)
        self.pvera_lambda_b = nn.Parameter(torch.zeros(layer.out_features))
        self.pvera_lambda_d = nn.Parameter(torch.full((2 * config.r,), float(config.d_initial)))
        if not config.init_weights:
            self.identity_at_birth = "init_weights=False starts with b = 1"
            nn.init.ones_(self.pvera_lambda_b)
            nn.init.normal_(self.pvera_lambda_d)
        if config.sample_at_inference:
            self.deterministic = "sample_at_inference=True samples in every call"

    @classmethod
    def build(cls, layer: LinearMap, config: PveraConfig, path: str, shared: Projections) -> Pvera:
        return cls(layer, config)

    @property
    def pvera_A(self) -> Tensor:
        return self.shared.corners(self.sides, self.pvera_lambda_d.device)[0]

    @property
    def pvera_B(self) -> Tensor:
        return self.shared.corners(self.sides, self.pvera_lambda_b.device)[1]

    def adapt(self, weight: Tensor) -> Tensor:
        b, d = self.pvera_lambda_b[:, None], self.pvera_lambda_d[: self.r, None]
        return weight + (b * self.pvera_B) @ (d * self.pvera_A[: self.r])

    def low_rank(self, layer: LinearMap) -> tuple[Tensor, Tensor]:
        b, d = self.pvera_lambda_b[:, None], self.pvera_lambda_d[: self.r, None]
        return b * self.pvera_B, d * self.pvera_A[: self.r]

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        y, A, d = layer(x), self.pvera_A, self.pvera_lambda_d
        x = self.pvera_dropout(x)
        z = layer.scale(layer.apply(x, A[: self.r]), d[: self.r])
        if self.training or self.sample_at_inference:
            log_variance = layer.scale(layer.apply(x, A[self.r :]), d[self.r :])
            z = z + self._noise(log_variance) * torch.exp(log_variance / 2)
        return y + layer.scale(layer.mix(z, self.pvera_B), self.pvera_lambda_b).to(y.dtype)

    def _noise(self, like: Tensor) -> Tensor:
        if self.pvera_generator is None:
            return torch.randn_like(like)
        return torch.randn(like.shape, dtype=like.dtype, generator=self.pvera_generator).to(like.device)

    def extra_repr(self) -> str:
        return f"r={self.r}"


def usual_targets(model_type: str) -> Any:
    return ["query", "value"] if model_type == "dinov2" else veras_targets(model_type)


METHOD = Method(
    PeftType.PVERA,
    PveraConfig,
    Pvera,
    key_prefix="pvera_",
    default_targets=usual_targets,
    shared=projections,
    learning_rate=4e-3,
    train_options=all_linear,
)
