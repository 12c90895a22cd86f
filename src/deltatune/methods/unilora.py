"""Uni-LoRA: W' = W + B A, each number of all A and B one of few trained ones, scaled.   https://arxiv.org/abs/2506.00799"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from deltatune import biases, checks
from deltatune.adapter import Adapter, LinearMap, Method, Stored
from deltatune.architectures import usual_targets
from deltatune.config import PeftType, config
from deltatune.factors import input_dropout
from deltatune.methods.common import LayerConfig, all_linear


@config
class UniLoraConfig(LayerConfig):
    """Uni-LoRA's options, with PEFT's names and defaults.

    Attributes:
        r: Rank of the updates.
        theta_d_length: How many numbers train, for the whole model.
        proj_seed: Seed of the places: which number stands where in which A and B.
        save_indices: Files hold the places. Without, they hold a checksum, and the places are drawn again on loading.
        unilora_dropout: Dropout on the input of A, in training.
        init_theta_d_bound: The numbers start uniform within +- this; with `init_weights=False` normal.
        fan_in_fan_out: Accepted and ignored: how a layer stores its weight is read off the layer.
    """

    beyond_peer: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})

    r: int = 4
    theta_d_length: int = 256
    proj_seed: int = 42
    unilora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False

    def __post_init__(self) -> None:
        self.peft_type = PeftType.UNILORA
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("UniLoraConfig", "r", self.r)
        checks.positive_int("UniLoraConfig", "theta_d_length", self.theta_d_length)
        if not checks.fits(self.proj_seed, int) or self.proj_seed < 0:
            checks.refuse("UniLoraConfig", "proj_seed", self.proj_seed, "an integer of 0 or more")
        checks.probability("UniLoraConfig", "unilora_dropout", self.unilora_dropout)
        checks.finite_positive("UniLoraConfig", "init_theta_d_bound", self.init_theta_d_bound)
        biases.check("UniLoraConfig", self.bias, "unilora_only")


class Numbers(Stored):
    """Trainable, and shared by all layers: theta_d.

    A number that stands in n places is scaled by n^-1/2, so that the way from theta_d to all A and B keeps lengths.
    """

    unilora_scales: Tensor

    def __init__(self, layers: dict[str, LinearMap], config: UniLoraConfig) -> None:
        super().__init__()
        bound = config.init_theta_d_bound
        start = torch.empty(config.theta_d_length)
        self.unilora_theta_d = nn.Parameter(start.uniform_(-bound, bound) if config.init_weights else start.normal_())
        sizes = [config.r * side for layer in layers.values() for side in (layer.in_features, layer.out_features)]
        places = _places(sum(sizes), config.theta_d_length, config.proj_seed)
        counts = torch.bincount(places, minlength=config.theta_d_length)
        self.register_buffer("unilora_scales", counts.clamp_min(1).float().rsqrt(), persistent=False)
        pieces = iter(places.split(sizes))
        self.places = {path: (next(pieces), next(pieces)) for path in layers}  # handed on to the layers

    @property
    def scaled(self) -> Tensor:
        return self.unilora_theta_d * self.unilora_scales


def _places(count: int, length: int, seed: int) -> Tensor:
    """`count` indices into `length` numbers, each as often as any other or once more, shuffled."""
    generator = np.random.default_rng(seed)  # its stream decides the meaning of files
    more = generator.choice(length, size=count % length, replace=False) if count % length else []
    found = np.concatenate([np.repeat(np.arange(length), count // length), more]).astype(np.int64)
    generator.shuffle(found)
    return torch.from_numpy(found)


class UniLora(Adapter):
    """Nothing of its own trains; places (r, in) and (out, r) in theta_d."""

    identity_at_birth: bool | str = "B A is random: theta_d is drawn"
    views: ClassVar[tuple[str, ...]] = (
        *("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B", "unilora_dropout", "r"),
    )

    unilora_indices_A: Tensor
    unilora_indices_B: Tensor

    def __init__(self, layer: LinearMap, config: UniLoraConfig, places: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.r, self.keeps_derived = config.r, config.save_indices
        self.unilora_dropout = input_dropout(layer, config.unilora_dropout)
        A, B = places[0].reshape(config.r, -1), places[1].reshape(-1, config.r)
        self.register_buffer("unilora_indices_A", A.to(torch.int32), persistent=False)
        self.register_buffer("unilora_indices_B", B.to(torch.int32), persistent=False)

    @classmethod
    def build(cls, layer: LinearMap, config: UniLoraConfig, path: str, shared: Numbers) -> UniLora:
        return cls(layer, config, shared.places.pop(path))

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r)."""
        numbers = self.shared.scaled.to(self.unilora_indices_A.device)
        return numbers[self.unilora_indices_A], numbers[self.unilora_indices_B]

    def adapt(self, weight: Tensor) -> Tensor:
        A, B = self.factors
        return weight + B @ A

    def low_rank(self, layer: LinearMap) -> tuple[Tensor, Tensor]:
        A, B = self.factors
        return B, A

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        y, (A, B) = layer(x), self.factors
        x = self.unilora_dropout(x)
        return y + layer.mix(layer.apply(x, A), B).to(y.dtype)

    # Files that hold the places hold the scale of each place too.

    @property
    def unilora_scales_A(self) -> Tensor:
        return self.shared.unilora_scales.to(self.unilora_indices_A.device)[self.unilora_indices_A]

    @property
    def unilora_scales_B(self) -> Tensor:
        return self.shared.unilora_scales.to(self.unilora_indices_B.device)[self.unilora_indices_B]

    def derived_tensors(self) -> dict[str, Tensor]:
        names = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")
        return {name: getattr(self, name) for name in names}

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        scales = self.shared.unilora_scales
        for side, indices in (("A", self.unilora_indices_A), ("B", self.unilora_indices_B)):
            if f"unilora_indices_{side}" in tensors:
                indices.copy_(tensors[f"unilora_indices_{side}"])
                scales[indices.to(scales.device)] = tensors[f"unilora_scales_{side}"].to(scales)

    def extra_repr(self) -> str:
        return f"r={self.r}"


METHOD = Method(
    PeftType.UNILORA,
    UniLoraConfig,
    UniLora,
    key_prefix="unilora_",
    default_targets=usual_targets,
    shared=Numbers,
    learning_rate=5e-3,
    train_options=all_linear,
)
