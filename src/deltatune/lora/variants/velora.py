"""VeLoRA: for the gradient of A, x is kept as its projections onto one vector.   https://arxiv.org/abs/2405.17991

x is cut into groups, each kept as p = x_g . v, and put together again as p v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune import checks
from deltatune.adapter import LinearMap
from deltatune.lora.variants.options import Options
from deltatune.lora.variants.variant import Variant


@dataclass
class VeloraConfig(Options):
    """VeLoRA's options, with PEFT's names and defaults.

    Attributes:
        num_groups: Numbers that are kept per token; more of them are more exact, and need more memory.
        scale: Of the activations that are put together again.
        init_type: v is the mean of the groups of every batch ("batch_average"), of the first ("batch_average_once"), or
            drawn ("random").
    """

    num_groups: int = 64
    scale: float = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"

    def validate(self) -> None:
        checks.positive_int("VeloraConfig", "num_groups", self.num_groups)
        checks.finite_positive("VeloraConfig", "scale", self.scale)
        allowed = ("batch_average", "batch_average_once", "random")
        checks.one_of("VeloraConfig", "init_type", self.init_type, allowed)


class Velora(Variant):
    """Nothing more is trained; the buffer v (in / groups), of length one, is in files. It acts in training alone."""

    field: ClassVar[str] = "velora_config"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    views: ClassVar[tuple[str, ...]] = ("lora_velora_embed",)

    lora_velora_embed: Tensor

    def __init__(self, width: int, options: VeloraConfig) -> None:
        super().__init__()
        self.groups, self.scale = options.num_groups, options.scale
        size = -(-width // options.num_groups)
        drawn = options.init_type == "random"
        self.every_batch, self.first_batch = options.init_type == "batch_average", not drawn
        self.register_buffer("lora_velora_embed", _unit(torch.randn(size)) if drawn else torch.zeros(size))

    @classmethod
    def build(cls, layer: LinearMap, config: Any, path: str, r: int) -> Velora:
        return cls(layer.in_features, config.velora_config)

    def project(self, x: Tensor, A: Tensor, layer: LinearMap) -> Tensor | None:
        if not (self.training and torch.is_grad_enabled() and A.requires_grad):
            return None
        v = self.lora_velora_embed
        if self.every_batch or (self.first_batch and not v.any()):
            with torch.no_grad():
                v.copy_(_unit(_grouped(x, self.groups).flatten(0, -2).mean(dim=0, dtype=v.dtype)))
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return _Compressed.apply(x.to(dtype), A.to(dtype), v.clone(), self.groups, self.scale)[0]

    def kept_tensors(self) -> dict[str, Tensor]:
        return {"lora_velora_embed": self.lora_velora_embed}


def _unit(v: Tensor) -> Tensor:
    length = v.norm()
    return torch.where(length > 0, v / length, torch.full_like(v, len(v) ** -0.5))


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(..., in) -> (..., groups, in / groups), filled up with zeros."""
    size = -(-x.shape[-1] // groups)
    return F.pad(x, (0, groups * size - x.shape[-1])).unflatten(-1, (groups, size))


class _Compressed(torch.autograd.Function):
    """x A^T, which keeps (tokens, groups) numbers of x for its gradient."""

    @staticmethod
    def forward(x: Tensor, A: Tensor, v: Tensor, groups: int, scale: float) -> tuple[Tensor, Tensor]:
        return F.linear(x, A), _grouped(x, groups) @ v.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, A, v, _, scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(A, v, output[1])
        ctx.width, ctx.scale = x.shape[-1], scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        A, v, kept = ctx.saved_tensors
        of_x = grads[0] @ A if ctx.needs_input_grad[0] else None
        x = (kept[..., None] * v.to(kept.dtype)).flatten(-2)[..., : ctx.width]
        of_A = ctx.scale * grads[0].flatten(0, -2).mT @ x.flatten(0, -2)
        return of_x, of_A, None, None, None
