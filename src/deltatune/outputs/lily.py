"""Lily: y = W x + s sum_e w_e B_e A x, w the mean over the row's tokens of softmax(router A x).

Each A is that of `stride_A` layers, the B_e are those of all layers of a kind.   https://arxiv.org/abs/2407.09946
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Adapter, LinearMap, Method, Stored
from deltatune.architectures import usual_targets
from deltatune.calls import Value
from deltatune.config import PeftType, config
from deltatune.factors import Factor
from deltatune.methods.common import LayerConfig, all_linear
from deltatune.outputs.places import DECODER_TOKENS, TOKENS, sees_targets
from deltatune.patterns import name_matches
from deltatune.targets import ALL_LINEAR


@config
class LilyConfig(LayerConfig):
    """Lily's options, with PEFT's names and defaults.

    Attributes:
        r: Rank; two to four times as large as one of LoRA's, since there are fewer factors.
        stride_A: How many layers of a kind, one after the other, have one A.
        num_B: Number of B_e, common to all layers of a kind: those that one name of `target_modules` means and that
            have the same shape.
        scaling: Factor s.
        init_weights: True: B starts at zero; False random, so that a fresh adapter changes the output.
    """

    r: int = 32
    stride_A: int = 1
    num_B: int = 2
    scaling: float = 1.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LILY
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("LilyConfig", "r", self.r)
        checks.positive_int("LilyConfig", "stride_A", self.stride_A)
        checks.finite_positive("LilyConfig", "scaling", self.scaling)
        if self.num_B < 2:
            checks.refuse("LilyConfig", "num_B", self.num_B, "2 or more, between which the router chooses")

    def kind_of(self, path: str) -> str:
        """What the layer at a path shares its factors by, beside its shape: the name that has matched it."""
        if self.target_modules == ALL_LINEAR:
            return path.rpartition(".")[2]
        if isinstance(self.target_modules, str):
            return self.target_modules
        return max((name for name in self.target_modules or () if name_matches([name], path)), key=len)


class Pools(Stored):
    """Trainable and common to several layers: every A (r, in) and every stack of B_e (num_B r, out).

    Files hold each once, under the path of the first layer that has it: there PEFT, which repeats them for every layer,
    finds them too.
    """

    def __init__(self, layers: dict[str, LinearMap], config: LilyConfig) -> None:
        super().__init__()
        self.first_of_A: list[str] = []
        self.first_of_B: list[str] = []
        self.places: dict[str, tuple[int, int]] = {}  # path -> which A, which B
        self.lily_A, self.lily_B = nn.ModuleList(), nn.ModuleList()
        kinds: dict[tuple[str, int, int], list[str]] = {}
        for path, layer in layers.items():
            kinds.setdefault((config.kind_of(path), layer.out_features, layer.in_features), []).append(path)
        for (_, out, width), paths in kinds.items():
            self._add(self.lily_B, self.first_of_B, paths[0], (config.num_B * config.r, out), config.init_weights)
            for index, path in enumerate(paths):
                if index % config.stride_A == 0:
                    self._add(self.lily_A, self.first_of_A, path, (config.r, width), False)
                self.places[path] = (len(self.lily_A) - 1, len(self.lily_B) - 1)

    def _add(self, pool: nn.ModuleList, first: list[str], path: str, shape: tuple[int, int], zero: bool) -> None:
        made = Factor(*shape)
        nn.init.zeros_(made.weight) if zero else nn.init.kaiming_uniform_(made.weight, a=math.sqrt(5))
        pool.append(made)
        first.append(path)

    def file_tensors(self) -> dict[str, Tensor]:
        pools: Any = {"lily_A": (self.first_of_A, self.lily_A), "lily_B": (self.first_of_B, self.lily_B)}
        return {  # `model.`: beside the layers, not at the top where the names of shared tensors begin
            f"model.{path}.{name}.weight": factor.weight
            for name, (first, pool) in pools.items()
            for path, factor in zip(first, pool)
        }


class Lily(Adapter):
    """Trainable: the router (num_B, r), beside what layers share."""

    base_kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    mergeable: bool | str = "each row has a mixture of its own"
    pointwise: bool | str = "the mixture is that of a whole row"
    reads: tuple[Value, ...] = (TOKENS, DECODER_TOKENS)
    views: ClassVar[tuple[str, ...]] = ("lily_A", "lily_B", "lily_router", "r", "scaling", "stride_A", "num_B")

    def __init__(self, config: LilyConfig, path: str, pools: Pools) -> None:
        super().__init__()
        self.r, self.num_B, self.stride_A, self.scaling = config.r, config.num_B, config.stride_A, config.scaling
        self.in_decoder, (self.which_A, self.which_B) = sees_targets(path), pools.places[path]
        first = {"lily_A": pools.first_of_A, "lily_B": pools.first_of_B}
        self.held = {name for name, paths in first.items() if path in paths}
        self.lily_router = Factor(config.num_B, config.r)
        nn.init.kaiming_uniform_(self.lily_router.weight, a=math.sqrt(5))
        if not config.init_weights:
            self.identity_at_birth = "init_weights=False draws all factors"

    @classmethod
    def build(cls, layer: LinearMap, config: LilyConfig, path: str, shared: Pools) -> Lily:
        return cls(config, path, shared)

    @property
    def lily_A(self) -> Factor:
        return self.shared.lily_A[self.which_A]

    @property
    def lily_B(self) -> Factor:
        return self.shared.lily_B[self.which_B]

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """PEFT repeats what layers share."""
        shared = {f"{name}.weight" for name in {"lily_A", "lily_B"} - self.held}
        return {name: tensor for name, tensor in tensors.items() if name not in shared}

    def forward(self, x: Any, layer: LinearMap, **values: Any) -> Tensor:
        y, B, router = layer(x), self.lily_B.weight.unflatten(0, (self.num_B, self.r)), self.lily_router.weight
        h = layer.apply(x, self.lily_A.weight)  # r numbers for each token: what is wider costs little from here on
        h = h.to(torch.promote_types(h.dtype, router.dtype))
        choice = nn.functional.linear(h, router.to(h.dtype)).softmax(dim=-1)
        if x.ndim < 3:  # one token for each row
            update = (choice[..., None] * h[..., None, :]).flatten(-2) @ B.flatten(0, 1).to(h.dtype)
        else:
            w = _mean(choice.flatten(1, -2), values.get("decoder_tokens" if self.in_decoder else "tokens"))
            update = _mixed(h.flatten(1, -2), self.scaling * w, B)
            return y + update.reshape(y.shape).to(y.dtype)
        return y + (self.scaling * update.reshape(y.shape)).to(y.dtype)

    def extra_repr(self) -> str:
        return f"r={self.r}, num_B={self.num_B}, scaling={self.scaling:g}"


def _mixed(h: Tensor, w: Tensor, B: Tensor) -> Tensor:
    """sum_e w_e B_e^T h, for h (rows, tokens, r), w (rows, num_B) and B (num_B, r, out)."""
    if h.shape[1] > len(B):  # then a matrix for each row is less work than num_B r columns for each token
        return torch.bmm(h, (w @ B.to(h.dtype).flatten(1)).unflatten(1, B.shape[1:]))
    weighted = h[..., None, :] * w[:, None, :, None]
    return weighted.flatten(-2) @ B.to(h.dtype).flatten(0, 1)


def _mean(choice: Tensor, tokens: Tensor | None) -> Tensor:
    """Of (B, T, num_B) over the tokens of each row; padding, where it is known, does not count."""
    if tokens is None or tokens.shape[1] != choice.shape[1]:
        return choice.mean(dim=1)
    tokens = tokens[..., None].to(choice.dtype)
    return (choice * tokens).sum(dim=1) / tokens.sum(dim=1).clamp(min=1)


METHOD = Method(
    PeftType.LILY,
    LilyConfig,
    Lily,
    key_prefix="lily_",
    default_targets=usual_targets,
    shared=Pools,
    learning_rate=1e-3,
    train_options=all_linear,
)
