"""OFT: W' = W R^T, R a block-diagonal rotation of the input.   https://arxiv.org/abs/2306.07280, /2506.19847 (v2)"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError
from deltatune.factors import Factor, cayley, cayley_neumann, skew_symmetric
from deltatune.methods.common import LayerConfig, all_linear
from deltatune.methods.lora import usual_targets


@config
class OFTConfig(LayerConfig):
    """OFT's options, with PEFT's names and defaults.

    Attributes:
        oft_block_size: Width of a block; give this or `r`, the number of blocks, and leave the other at 0.
        use_cayley_neumann: Take the rotation from a series of `num_cayley_neumann_terms` instead of a matrix inverse.
        coft: Keep every block within a distance `eps` of the identity.
        block_share: One block for all.
        module_dropout: Share of blocks that are replaced by the identity, in training.
        init_weights: True starts as the identity; False random.
    """

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        self.peft_type = PeftType.OFT
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.probability("OFTConfig", "module_dropout", self.module_dropout)
        checks.finite_positive("OFTConfig", "eps", self.eps)
        if self.num_cayley_neumann_terms < 2:  # the first term is the identity
            checks.refuse(
                "OFTConfig", "num_cayley_neumann_terms", self.num_cayley_neumann_terms, "an integer of 2 or more"
            )
        checks.one_of("OFTConfig", "bias", self.bias, ("none",))
        if min(self.r, self.oft_block_size) < 0 or (self.r > 0) == (self.oft_block_size > 0):
            raise ConfigError(
                f"OFTConfig: r={self.r} and oft_block_size={self.oft_block_size}: give one of them and 0 for the other",
                field="oft_block_size",
                found=(self.r, self.oft_block_size),
            )


class OFT(Adapter):
    """Trainable: the b (b - 1) / 2 numbers above the diagonal of each skew-symmetric block Q, b its width."""

    base_kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    views: ClassVar[tuple[str, ...]] = ("oft_R", "oft_block_size", "r")

    def __init__(
        self, layer: LinearMap, size: int, share: bool, terms: int, limit: float | None, dropout: float
    ) -> None:
        super().__init__()
        self.oft_block_size, self.blocks, self.terms = size, layer.in_features // size, terms
        self.r, self.limit, self.dropout = self.blocks, limit, dropout
        self.vectors_in = layer.kind == "linear"
        self.oft_R = Factor(1 if share else self.blocks, size * (size - 1) // 2)

    @classmethod
    def build(cls, layer: LinearMap, config: OFTConfig, path: str) -> OFT:
        width = layer.in_features
        size = config.oft_block_size or width // config.r
        if size < 2 or width % size or (config.r and width % config.r):
            field = "r" if config.r else "oft_block_size"
            legal = [n for n in range(2, width + 1) if width % n == 0]
            near = min(legal, key=lambda n: abs(n - size), default=width)
            near = width // near if config.r else near
            raise ConfigError(
                f"OFTConfig: {field}={getattr(config, field)} does not divide the {width} inputs of {path}; "
                f"the nearest value that does is {near}",
                field=field,
                found=getattr(config, field),
                expected=near,
            )
        terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else 0
        limit = config.eps if config.coft else None
        made = cls(layer, size, config.block_share, terms, limit, config.module_dropout)
        nn.init.zeros_(made.oft_R.weight) if config.init_weights else nn.init.normal_(made.oft_R.weight, std=0.1)
        if not config.init_weights:
            made.identity_at_birth = "init_weights=False draws the rotations"
        return made

    @property
    def R(self) -> Tensor:
        """The rotations (blocks, size, size)."""
        Q = skew_symmetric(self.oft_R.weight, self.oft_block_size)
        if self.limit is not None:
            Q = _within(Q, self.limit)
        R = cayley_neumann(Q, self.terms) if self.terms else cayley(Q)
        return self._dropped(R).expand(self.blocks, -1, -1)

    def _dropped(self, R: Tensor) -> Tensor:
        if not (self.training and self.dropout) or len(R) == 1:
            return R
        eye = torch.eye(R.shape[-1], device=R.device, dtype=R.dtype)
        return torch.where(torch.rand(len(R), 1, 1, device=R.device) < self.dropout, eye, R)

    def rotate(self, x: Tensor) -> Tensor:
        """x R over the last axis, block by block."""
        parts = x.unflatten(-1, (self.blocks, self.oft_block_size))
        return torch.einsum("...nk,nkc->...nc", parts, self.R.to(x.dtype)).flatten(-2)

    def adapt(self, weight: Tensor) -> Tensor:
        parts = weight.to(torch.promote_types(weight.dtype, self.oft_R.weight.dtype))
        parts = parts.unflatten(-1, (self.blocks, self.oft_block_size))
        return torch.einsum("onc,nkc->onk", parts, self.R.to(parts.dtype)).flatten(-2)

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        return layer(self.rotate(x)) if self.vectors_in else super().forward(x, layer)


def _within(Q: Tensor, limit: float) -> Tensor:
    """Blocks drawn back to a distance `limit` / sqrt(blocks) from zero; the gradient passes as if they had not been."""
    limit = limit / len(Q) ** 0.5
    norm = Q.norm(dim=(1, 2), keepdim=True)
    drawn = torch.where(norm <= limit, Q, Q * (limit / norm.clamp_min(torch.finfo(Q.dtype).tiny)))
    return Q + (drawn - Q).detach()


METHOD = Method(
    PeftType.OFT, OFTConfig, OFT, key_prefix="oft_", default_targets=usual_targets, train_options=all_linear
)
