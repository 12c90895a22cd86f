"""RandLoRA: W' = W + (alpha / r) sum_j B_j L_j A G_j, A and B_j random, L_j and G_j diagonal.

https://arxiv.org/abs/2502.00987
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import biases, checks
from deltatune.adapter import Adapter, LinearMap, Method, Stored
from deltatune.architectures import usual_targets
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError
from deltatune.factors import input_dropout
from deltatune.methods.common import LayerConfig, all_linear
from deltatune.projections import largest_sides


@config
class RandLoraConfig(LayerConfig):
    """RandLoRA's options, with PEFT's names and meaning; of the defaults `save_projection` differs.

    Attributes:
        r: Rank of one random basis; a layer has as many bases as make its update one of full rank. A smaller r trains
            more numbers.
        randlora_alpha: The update is scaled by randlora_alpha / r.
        projection_prng_key: Seed of A and B.
        save_projection: Files hold A and B. Without, they hold a checksum, and A and B are drawn again on loading.
        sparse: A and B hold -1, 0 and 1 (times a factor), one sixth of each sign; `very_sparse` fewer still.
        randlora_dropout: Dropout on the input of the update, in training.
        init_weights: True: the L_j start at zero; False random, so that a fresh adapter changes the output.
        fan_in_fan_out: Accepted and ignored: how a layer stores its weight is read off the layer.
    """

    beyond_peer: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})
    file_defaults: ClassVar[dict[str, Any]] = {"save_projection": True}

    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = False
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: int = 640
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.RANDLORA
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("RandLoraConfig", "r", self.r)
        checks.finite_positive("RandLoraConfig", "randlora_alpha", self.randlora_alpha)
        checks.probability("RandLoraConfig", "randlora_dropout", self.randlora_dropout)
        biases.check("RandLoraConfig", self.bias, "randlora_only")


class Bases(Stored):
    """Frozen: A (r, 1, short side) and B (long side, bases, r) for the largest layer; the others use their corners."""

    randlora_A: Tensor
    randlora_B: Tensor

    def __init__(self, layers: dict[str, LinearMap], config: RandLoraConfig) -> None:
        super().__init__()
        self.keeps_derived = config.save_projection
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        sides = largest_sides(layers.values())
        short, long, bases = min(sides), max(sides), math.ceil(min(sides) / config.r)
        if config.sparse or config.very_sparse:
            sparsity = math.sqrt(short) if config.very_sparse else 3
            A = _signs((config.r, 1, short), sparsity, generator)
            B = _signs((long, bases, config.r), sparsity, generator)
        else:
            A = _bfloat16((config.r, 1, short), generator)
            B = torch.cat([_bfloat16((long, 1, config.r), generator) for _ in range(bases)], dim=1)
        self.register_buffer("randlora_A", _normalised(A, config), persistent=False)
        self.register_buffer("randlora_B", _normalised(B, config), persistent=False)

    def derived_tensors(self) -> dict[str, Tensor]:
        return {"randlora_A": self.randlora_A, "randlora_B": self.randlora_B}


def _bfloat16(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Drawn and scaled in this precision, which decides the numbers."""
    return nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)


def _signs(shape: tuple[int, ...], sparsity: float, generator: torch.Generator) -> Tensor:
    """-1 and 1 with probability 1 / (2 sparsity) each, else 0.   https://doi.org/10.1145/1150402.1150436"""
    drawn, edge = torch.rand(shape, generator=generator), 1 / (2 * sparsity)
    return (drawn > 1 - edge).float() - (drawn < edge).float()


def _normalised(basis: Tensor, config: RandLoraConfig) -> Tensor:
    found = (basis / basis.std()).float()
    if not found.isfinite().all():
        name = "very_sparse" if config.very_sparse else "sparse"
        raise ConfigError(f"RandLoraConfig: {name}=True leaves a basis of {found.numel()} numbers zero", field=name)
    return found


class RandLora(Adapter):
    """Trainable: the diagonals of L_j (r, bases) and of G_j (bases, short side)."""

    views: ClassVar[tuple[str, ...]] = (
        *("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B", "randlora_dropout", "r", "scaling"),
    )
    bounded_r: ClassVar[bool] = False

    def __init__(self, layer: LinearMap, config: RandLoraConfig) -> None:
        super().__init__()
        self.r, self.scaling = config.r, config.randlora_alpha / config.r
        self.wide = layer.in_features > layer.out_features
        self.short, self.long = sorted((layer.in_features, layer.out_features))
        self.bases = math.ceil(self.short / config.r)
        self.randlora_dropout = input_dropout(layer, config.randlora_dropout)
        self.randlora_lambda = nn.Parameter(torch.zeros(config.r, self.bases))
        start = 1 / max(self.bases, self.short) if config.init_weights else 1 / self.long
        self.randlora_gamma = nn.Parameter(torch.full((self.bases, self.short), start))
        if not config.init_weights:
            self.identity_at_birth = "init_weights=False draws the diagonals of L_j"
            nn.init.normal_(self.randlora_lambda)

    @classmethod
    def build(cls, layer: LinearMap, config: RandLoraConfig, path: str, shared: Bases) -> RandLora:
        return cls(layer, config)

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """PEFT repeats A and B for every layer."""
        return {name: value for name, value in tensors.items() if name not in ("randlora_A", "randlora_B")}

    @property
    def randlora_A(self) -> Tensor:
        return self.shared.randlora_A[..., : self.short].to(self.randlora_gamma.device)

    @property
    def randlora_B(self) -> Tensor:
        return self.shared.randlora_B[: self.long, : self.bases].to(self.randlora_gamma.device)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Both as matrices, (r bases, in) and (out, r bases); the short side is the trained one.

        Row k * bases + j of the one meets column j * r + k of the other: as the columns of B are random, another order
        of them is another draw, and this is the one that PEFT's files mean.
        """
        trained = (self.randlora_lambda[..., None] * self.randlora_A * self.randlora_gamma).flatten(0, 1)
        drawn = self.randlora_B.flatten(1)
        return (drawn.T, trained.T) if self.wide else (trained, drawn)

    def adapt(self, weight: Tensor) -> Tensor:
        down, up = self.factors
        return weight + self.scaling * (up @ down)

    def low_rank(self, layer: LinearMap) -> tuple[Tensor, Tensor] | None:
        down, up = self.factors
        return (self.scaling * up, down) if len(down) < min(len(up), down.shape[1]) else None

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        y, (down, up) = layer(x), self.factors
        x = self.randlora_dropout(x)
        return y + (self.scaling * layer.mix(layer.apply(x, down), up)).to(y.dtype)

    def extra_repr(self) -> str:
        return f"r={self.r}, bases={self.bases}, scaling={self.scaling:g}"


METHOD = Method(
    PeftType.RANDLORA,
    RandLoraConfig,
    RandLora,
    key_prefix="randlora_",
    default_targets=usual_targets,
    shared=Bases,
    learning_rate=1e-3,
    train_options=all_linear,
)
