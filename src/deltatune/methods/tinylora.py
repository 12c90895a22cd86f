"""TinyLoRA: W' = W + B (sum_k v_k P_k) A with B A the largest singular parts of W.   https://arxiv.org/abs/2602.04118"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import biases, checks
from deltatune.adapter import Adapter, LinearMap, Method, Stored
from deltatune.architectures import usual_targets
from deltatune.config import PeftType, config
from deltatune.factors import input_dropout
from deltatune.kernels import low_rank as fused
from deltatune.methods.common import LayerConfig, all_linear


@config
class TinyLoraConfig(LayerConfig):
    """TinyLoRA's options, with PEFT's names and meaning; of the defaults `save_projection` differs.

    Attributes:
        r: How many singular values of a weight take part.
        u: Length of a vector v, all that trains.
        weight_tying: How far layers share a v: 0 not at all, 1 one v for all of them.
        projection_seed: Seed of the matrices P_k; layer number i adds i.
        save_projection: Files hold A, B and P. Without, they hold a checksum, and the three are made again on loading.
        tinylora_dropout: Dropout on the input of A, in training.
        init_weights: True: v starts at zero. "uniform" (or False): within +- `init_v_bound`.
        fan_in_fan_out: Accepted and ignored: how a layer stores its weight is read off the layer.
    """

    beyond_peer: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})
    file_defaults: ClassVar[dict[str, Any]] = {"save_projection": True}

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = False
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.TINYLORA
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("TinyLoraConfig", "r", self.r)
        checks.positive_int("TinyLoraConfig", "u", self.u)
        if not 0 <= self.weight_tying <= 1:
            checks.refuse("TinyLoraConfig", "weight_tying", self.weight_tying, "a number from 0 to 1")
        checks.probability("TinyLoraConfig", "tinylora_dropout", self.tinylora_dropout)
        checks.one_of("TinyLoraConfig", "init_weights", self.init_weights, (True, False, "uniform"))
        biases.check("TinyLoraConfig", self.bias, "tinylora_only")


class Vectors(Stored):
    """Trainable: a vector v (u) for each group of neighbouring layers, under the group's number."""

    def __init__(self, layers: dict[str, LinearMap], config: TinyLoraConfig) -> None:
        super().__init__()
        groups = max(1, round(len(layers) * (1 - config.weight_tying)))
        size = max(1, len(layers) // groups)
        self.places = {path: (index, str(min(index // size, groups - 1))) for index, path in enumerate(layers)}
        bound = 0.0 if config.init_weights is True else config.init_v_bound
        used = dict.fromkeys(group for _, group in self.places.values())
        self.tinylora_v = nn.ParameterDict(
            {group: nn.Parameter(torch.empty(config.u).uniform_(-bound, bound)) for group in used}
        )


class TinyLora(Adapter):
    """Nothing of its own trains. Frozen: A (r, in), B (out, r), P (u, r, r); for an embedding A and B of its table."""

    views: ClassVar[tuple[str, ...]] = ("tinylora_A", "tinylora_B", "tinylora_P", "tinylora_dropout", "r", "u")

    tinylora_A: Tensor
    tinylora_B: Tensor
    tinylora_P: Tensor

    def __init__(self, layer: LinearMap, config: TinyLoraConfig, index: int, group: str) -> None:
        super().__init__()
        self.group, self.u, self.keeps_derived = group, config.u, config.save_projection
        self.embedding = layer.kind == "embedding"
        self.tinylora_dropout = input_dropout(layer, config.tinylora_dropout)
        if config.init_weights is not True:
            self.identity_at_birth = f"init_weights={config.init_weights!r} draws v"
        weight = layer.weight.detach().float()
        U, S, V = torch.linalg.svd(weight.T if self.embedding else weight, full_matrices=False)
        root, self.r = S[: config.r].sqrt(), min(config.r, len(S))
        generator = torch.Generator().manual_seed(config.projection_seed + index)
        P = torch.normal(0.0, self.r**-0.5, (config.u, self.r, self.r), generator=generator)
        self.register_buffer("tinylora_A", root[:, None] * V[: config.r], persistent=False)
        self.register_buffer("tinylora_B", U[:, : config.r] * root, persistent=False)
        self.register_buffer("tinylora_P", P, persistent=False)

    @classmethod
    def build(cls, layer: LinearMap, config: TinyLoraConfig, path: str, shared: Vectors) -> TinyLora:
        return cls(layer, config, *shared.places[path])

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """(r, in) and (out, r), with R = sum_k v_k P_k in the one next to the input: so only that has a gradient."""
        v = self.shared.tinylora_v[self.group].to(self.tinylora_P.device)
        R = (v @ self.tinylora_P.flatten(1)).view(self.r, self.r)
        if self.embedding:
            return (self.tinylora_B @ R).T, self.tinylora_A.T
        return R @ self.tinylora_A, self.tinylora_B

    def adapt(self, weight: Tensor) -> Tensor:
        down, up = self.factors
        return weight + up @ down

    def low_rank(self, layer: LinearMap) -> tuple[Tensor, Tensor]:
        down, up = self.factors
        return up, down

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        down, up = self.factors
        if fused.fits(x, layer) and not isinstance(self.tinylora_dropout, nn.Dropout):
            return fused.low_rank_linear(x, layer.weight, layer.bias, down, up)
        y, x = layer(x), self.tinylora_dropout(x)
        return y + layer.mix(layer.apply(x, down), up).to(y.dtype)

    def derived_tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("tinylora_A", "tinylora_B", "tinylora_P")}

    def extra_repr(self) -> str:
        return f"r={self.r}, u={self.u}, group={self.group}"


METHOD = Method(
    PeftType.TINYLORA,
    TinyLoraConfig,
    TinyLora,
    key_prefix="tinylora_",
    default_targets=usual_targets,
    shared=Vectors,
    learning_rate=1e-2,
    train_options=all_linear,
)
