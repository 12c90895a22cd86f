"""OFT: W' = W R^T, R a block-diagonal rotation of the input; of an embedding's rows E' = E R.

https://arxiv.org/abs/2306.07280, /2506.19847 (v2)
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import biases, checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError
from deltatune.factors import Factor, cayley, cayley_neumann, skew_symmetric
from deltatune.methods.common import LayerConfig, all_linear
from deltatune.one_product import by_hand


@config
class OFTConfig(LayerConfig):
    """OFT's options, with PEFT's names and defaults.

    Attributes:
        oft_block_size: Width of a block; give this or `r`, the number of blocks, and leave the other at 0.
        adjust_size: Where that does not divide a layer, take the nearest value that does instead of refusing. Files are
            read so: they name one size, which PEFT has adjusted layer by layer.
        use_cayley_neumann: Take the rotation from a series of `num_cayley_neumann_terms` instead of a matrix inverse.
        coft: Keep every block within a distance `eps` of the identity.
        block_share: One block for all.
        module_dropout: Share of blocks that are replaced by the identity, in training.
        init_weights: True starts as the identity; False random.
    """

    unsaved: ClassVar[frozenset[str]] = frozenset({"adjust_size"})
    file_defaults: ClassVar[dict[str, Any]] = {"adjust_size": True}

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
    adjust_size: bool = False

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
        biases.check("OFTConfig", self.bias, "oft_only")
        if min(self.r, self.oft_block_size) < 0 or (self.r > 0) == (self.oft_block_size > 0):
            raise ConfigError(
                f"OFTConfig: r={self.r} and oft_block_size={self.oft_block_size}: give one of them and 0 for the other",
                field="oft_block_size",
                found=(self.r, self.oft_block_size),
            )


class OFT(Adapter):
    """Trainable: the b (b - 1) / 2 numbers above the diagonal of each skew-symmetric block Q, b its width."""

    views: ClassVar[tuple[str, ...]] = ("oft_R", "oft_embedding_R", "oft_block_size", "r")

    def __init__(
        self, layer: LinearMap, size: int, share: bool, terms: int, limit: float | None, dropout: float
    ) -> None:
        super().__init__()
        self.kind, self.oft_block_size, self.blocks, self.terms = layer.kind, size, _turns(layer) // size, terms
        self.r, self.limit, self.dropout = self.blocks, limit, dropout
        factor = Factor(1 if share else self.blocks, size * (size - 1) // 2)
        self.oft_R = None if layer.kind == "embedding" else factor
        self.oft_embedding_R = factor if layer.kind == "embedding" else None

    @classmethod
    def build(cls, layer: LinearMap, config: OFTConfig, path: str) -> OFT:
        terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else 0
        limit = config.eps if config.coft else None
        made = cls(layer, _size(layer, config, path), config.block_share, terms, limit, config.module_dropout)
        nn.init.zeros_(made.entries) if config.init_weights else nn.init.normal_(made.entries, std=0.1)
        if not config.init_weights:
            made.identity_at_birth = "init_weights=False draws the rotations"
        return made

    @property
    def entries(self) -> Tensor:
        """The numbers above the diagonals, (blocks, b (b - 1) / 2)."""
        factor = self.oft_embedding_R if self.oft_R is None else self.oft_R
        assert factor is not None
        return factor.weight

    @property
    def R(self) -> Tensor:
        """The rotations (blocks, size, size)."""
        Q = skew_symmetric(self.entries, self.oft_block_size)
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
        R = self.R
        R = R.to(torch.promote_types(R.dtype, x.dtype) if x.is_cpu else x.dtype)  # CPUs have no fast bmm in half
        return _Rotated.apply(x, R) if R.dtype != x.dtype and by_hand() else _rotated(x, R)

    def adapt(self, weight: Tensor) -> Tensor:
        weight = weight.to(torch.promote_types(weight.dtype, self.entries.dtype))
        if self.kind == "embedding":
            return self.rotate(weight.T).T
        parts = weight.unflatten(-1, (self.blocks, self.oft_block_size))
        return torch.einsum("onc,nkc->onk", parts, self.R.to(parts.dtype)).flatten(-2)

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        if self.kind == "embedding":
            return self.rotate(layer(x))
        return layer(self.rotate(x)) if self.kind == "linear" else super().forward(x, layer)


def _rotated(x: Tensor, R: Tensor) -> Tensor:
    """x R over the last axis, for the blocks R (n, b, b): computed in the precision of R."""
    turned = torch.bmm(_blocks(x, R), R).transpose(0, 1)
    return turned.to(x.dtype, memory_format=torch.contiguous_format).contiguous().view(x.shape)


def _blocks(x: Tensor, R: Tensor) -> Tensor:
    """(..., n b) -> (n, T, b)."""
    return x.to(R.dtype).reshape(-1, *R.shape[:2]).transpose(0, 1)


class _Rotated(torch.autograd.Function):
    """`_rotated` in a wider precision than that of x, of which only x is kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor) -> Tensor:
        ctx.save_for_backward(x, R)
        return _rotated(x, R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor]:
        x, R = ctx.saved_tensors
        of_x = _rotated(grads[0], R.mT) if ctx.needs_input_grad[0] else None
        return of_x, torch.bmm(_blocks(x, R).mT, _blocks(grads[0], R))


def _turns(layer: LinearMap) -> int:
    """How many numbers the rotation turns: an embedding's input are indices, so there it turns what comes out."""
    return layer.out_features if layer.kind == "embedding" else layer.in_features


def _size(layer: LinearMap, config: OFTConfig, path: str) -> int:
    """The width of a block of this layer."""
    width, given = _turns(layer), config.r or config.oft_block_size
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    if config.adjust_size:
        given = min(divisors, key=lambda n: abs(n - given))  # of two that are as near the smaller one, as in PEFT
    elif given not in divisors or given == (width if config.r else 1):
        field, side = "r" if config.r else "oft_block_size", "columns" if layer.kind == "embedding" else "inputs"
        divisors.remove(width if config.r else 1)  # blocks of one input have nothing to turn
        near = min(divisors, key=lambda n: abs(n - given), default=None)
        raise ConfigError(
            f"OFTConfig: {field}={given} does not cut the {width} {side} of {path} into equal blocks of 2 or more; the "
            f"nearest value that does is {near}, and adjust_size=True takes it layer by layer",
            field=field,
            path=path,
            found=given,
            expected=near,
        )
    return width // given if config.r else given


def _within(Q: Tensor, limit: float) -> Tensor:
    """Blocks drawn back to a distance `limit` / sqrt(blocks) from zero; the gradient passes as if they had not been."""
    limit = limit / len(Q) ** 0.5
    norm = Q.norm(dim=(1, 2), keepdim=True)
    drawn = torch.where(norm <= limit, Q, Q * (limit / norm.clamp_min(torch.finfo(Q.dtype).tiny)))
    return Q + (drawn - Q).detach()


METHOD = Method(
    PeftType.OFT, OFTConfig, OFT, key_prefix="oft_", default_targets=usual_targets, train_options=all_linear
)
