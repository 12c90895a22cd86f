"""`Start`: the factors with which LoRA begins on one layer, and what becomes of the base; helpers of all starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from deltatune import filling
from deltatune.adapter import LinearMap
from deltatune.errors import ConfigError
from deltatune.filling import Source, source
from deltatune.lora import prepared
from deltatune.lora.quantised import Quantised


@dataclass(frozen=True)
class Start:
    """Where LoRA begins.

    Attributes:
        A: (r, in), in the shape in which it trains or flat. B: (out, r), likewise.
        gives_way: The base gives way by s B A: W' = W + s (B A - B0 A0), with frozen copies of both as they are here.
        again: Config and base weight give the same factors again, here and in PEFT, so that files need not hold them.
        fixed_B: B does not train.
        stand_in: What takes the place of W.
        bias: B's own, if it has one and does not begin at zero.
        at_birth: True, or why a fresh adapter changes the output.
        awaits_data: Whether A is only what there is until data have spoken.
    """

    A: Tensor
    B: Tensor
    gives_way: bool = False
    again: bool = True
    fixed_B: bool = False
    stand_in: Quantised | None = None
    bias: Tensor | None = None
    at_birth: bool | str = True
    awaits_data: bool = False


@dataclass(frozen=True)
class Site:
    """What a start is told: the layer, its rank r, its scaling s, the LoraConfig and the layer's path.

    `down` and `up` are the shapes in which A and B train, others than (r, in) and (out, r) under some variants and
    under convolutions with groups. Starts that draw are for any of them, those that work A and B out for these alone.
    `born` is A, B and B's bias as PEFT draws them before any start, which keeps them or draws over them: drawn here as
    well, equal seeds give equal adapters.
    """

    map: LinearMap
    r: int
    scaling: float
    options: Any
    path: str
    down: tuple[int, ...]
    up: tuple[int, ...]
    born: tuple[Tensor, Tensor, Tensor | None] | None = None

    @property
    def W(self) -> Tensor:
        """The weight (out, in), detached, in float32 or wider.

        Raises:
            ConfigError: It has no values, or less than r singular directions.
        """
        weight = self.map.weight.detach()
        if weight.is_meta:
            self.refuse("decomposes the weight of", "has no values yet (it is on the meta device); load the base first")
        if self.r > min(weight.shape):
            self.refuse(
                f"with r={self.r} needs as many directions of",
                f"has {min(weight.shape)}; use r={min(weight.shape)}, or rank_pattern for this layer",
            )
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    def refuse(self, what: str, why: str) -> NoReturn:
        init = self.options.init_lora_weights
        raise ConfigError(
            f"LoraConfig: init_lora_weights={init!r} {what} {self.path}, which {why}",
            field="init_lora_weights",
            path=self.path,
            found=init,
        )


def kaiming(*shape: int) -> Tensor:
    """As nn.Linear starts: uniform on +- 1 / sqrt(numbers in a row). Zeros where a file brings the numbers."""
    if filling.brings_all():
        return torch.zeros(shape)
    # the bits of nn.init.kaiming_uniform_(a=sqrt(5)), whose checks take as long as the drawing
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / 6.0) / math.sqrt(math.prod(shape[1:])))
    return torch.empty(shape).uniform_(-bound, bound)


def birth(site: Site) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `Site.born` is."""
    if site.map.kind == "embedding":
        return torch.randn(site.down), torch.randn(site.up), None
    A, B, bound = kaiming(*site.down), kaiming(*site.up), 1 / math.sqrt(site.r)
    return A, B, torch.empty(site.map.out_features).uniform_(-bound, bound) if site.options.lora_bias else None


def balanced(U: Tensor, S: Tensor, Vh: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B with s B A = U diag(S) Vh, half of S on either side."""
    root = (S / scaling).sqrt()
    return (root[:, None] * Vh).contiguous(), (U * root).contiguous()


def prepared_for(site: Site, start: str, helper: str, rank: int) -> dict[str, Tensor] | None:
    """What a helper left on the layer; None where a file is about to fill the adapter instead.

    Raises:
        ConfigError: No helper was called, or with another rank.
    """
    if source() is Source.OWN:
        return None
    parts = prepared.found(site.map, start)
    if parts is None:
        site.refuse("needs what data say of", f"has no data yet; call {helper} first, or deltatune.lora.prepare")
    if len(parts["S"]) != rank:
        there = len(parts["S"])
        site.refuse(f"with r={site.r} takes {rank} directions of", f"was prepared with {there}; call {helper} again")
    return parts


def awaited(site: Site) -> Start:
    """Nothing yet: a file is about to fill both factors and their frozen start."""
    A, B = torch.zeros(site.r, site.map.in_features), torch.zeros(site.map.out_features, site.r)
    return Start(A, B, gives_way=True, again=False)
