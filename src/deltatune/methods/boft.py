"""BOFT: W' = diag(s) W R^T, R = B_m ... B_1, butterfly factors that are block-diagonal rotations after a permutation.

https://arxiv.org/abs/2311.06243
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
from deltatune.factors import cayley
from deltatune.methods.common import LayerConfig, all_linear


@config
class BOFTConfig(LayerConfig):
    """BOFT's options, with PEFT's names and defaults.

    Attributes:
        boft_block_size: Width b of a block; give this or `boft_block_num`, and leave the other at 0.
        boft_n_butterfly_factor: Number m of factors. With m = 1 it is OFT's rotation; each further one doubles the
            number of inputs that are mixed with each other. b 2^(m - 1) has to divide the inputs.
        boft_dropout: Share of the blocks of one random factor that are replaced by the identity, in training.
        init_weights: True starts as the identity; False random.
        fan_in_fan_out: Accepted and ignored: how a layer stores its weight is read off the layer.
    """

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.BOFT
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("BOFTConfig", "boft_n_butterfly_factor", self.boft_n_butterfly_factor)
        checks.probability("BOFTConfig", "boft_dropout", self.boft_dropout)
        biases.check("BOFTConfig", self.bias, "boft_only")
        size, count = self.boft_block_size, self.boft_block_num
        if min(size, count) < 0 or (size > 0) == (count > 0):
            raise ConfigError(
                f"BOFTConfig: boft_block_size={size} and boft_block_num={count}: give one of them and 0 for the other",
                field="boft_block_size",
                found=(size, count),
            )


class BOFT(Adapter):
    """Trainable: blocks A (m, blocks, b, b), of which (A - A^T) / 2 makes a rotation, and scales s of the outputs."""

    base_kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    views: ClassVar[tuple[str, ...]] = ("boft_R", "boft_s", "boft_block_size", "boft_block_num")

    def __init__(self, layer: LinearMap, size: int, factors: int, dropout: float, identity: bool) -> None:
        super().__init__()
        self.boft_block_size, self.boft_block_num, self.dropout = size, layer.in_features // size, dropout
        self.vectors_in = layer.kind == "linear"
        R = torch.zeros(factors, self.boft_block_num, size, size)
        s = torch.ones((1, layer.out_features) if layer.kind == "conv" else (layer.out_features, 1))  # as files have it
        if not identity:
            nn.init.normal_(R, std=0.1)
            nn.init.normal_(s, mean=1.0, std=0.1)
            self.identity_at_birth = "init_weights=False draws the rotations"
        self.boft_R, self.boft_s = nn.Parameter(R), nn.Parameter(s)

    @classmethod
    def build(cls, layer: LinearMap, config: BOFTConfig, path: str) -> BOFT:
        width, factors = layer.in_features, config.boft_n_butterfly_factor
        size = config.boft_block_size or width // config.boft_block_num
        legal = _legal_sizes(width, factors)
        if size not in legal or (config.boft_block_num and width % config.boft_block_num):
            field = "boft_block_num" if config.boft_block_num else "boft_block_size"
            near = min(legal, key=lambda n: abs(n - size), default=None)
            expected = None if near is None else width // near if config.boft_block_num else near
            advice = f"the nearest value that does is {expected}" if near else "use fewer factors, or leave it out"
            raise ConfigError(
                f"BOFTConfig: {field}={getattr(config, field)} with boft_n_butterfly_factor={factors} does not cut the "
                f"{width} inputs of {path} into blocks; {advice}",
                field=field,
                path=path,
                found=getattr(config, field),
                expected=expected,
            )
        return cls(layer, size, factors, config.boft_dropout, config.init_weights)

    @property
    def s(self) -> Tensor:
        return self.boft_s.flatten()

    @property
    def rotations(self) -> Tensor:
        """The blocks of the factors, (m, blocks, b, b)."""
        R = cayley((self.boft_R - self.boft_R.mT) / 2)
        if not (self.training and self.dropout):
            return R
        m, blocks, size, _ = R.shape
        chosen = torch.arange(m, device=R.device) == torch.randint(m, (1,), device=R.device)
        dropped = torch.rand(blocks, device=R.device).argsort() < int(self.dropout * blocks)
        eye = torch.eye(size, device=R.device, dtype=R.dtype)
        return torch.where((chosen[:, None] & dropped)[..., None, None], eye, R)

    def rotate(self, x: Tensor, transpose: bool = False) -> Tensor:
        """x R over the last axis, or x R^T; each factor costs b products a number, a dense R as many as inputs."""
        factors = list(enumerate(self.rotations.to(x.dtype)))
        for order, blocks in factors if transpose else reversed(factors):
            x = _turn(x, blocks.mT if transpose else blocks, 2**order)
        return x

    def adapt(self, weight: Tensor) -> Tensor:
        weight = weight.to(torch.promote_types(weight.dtype, self.boft_R.dtype))
        return self.s[:, None] * self.rotate(weight, transpose=True)

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        if not self.vectors_in:
            return super().forward(x, layer)
        y, bias = layer(self.rotate(x)), layer.bias
        return y + layer.scale(y if bias is None else y - bias.to(y.dtype), self.s - 1)  # the bias is not scaled

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """PEFT without its CUDA extension computes with one factor whatever its config says: the others are none."""
        R = tensors.get("boft_R")
        missing = 0 if R is None or R.shape[1:] != self.boft_R.shape[1:] else len(self.boft_R) - len(R)
        if R is None or missing <= 0:
            return tensors
        return {**tensors, "boft_R": torch.cat([R, R.new_zeros(missing, *R.shape[1:])])}

    def extra_repr(self) -> str:
        return f"block_size={self.boft_block_size}, factors={len(self.boft_R)}"


def _turn(x: Tensor, blocks: Tensor, distance: int) -> Tensor:
    """One butterfly factor: rotations of blocks whose two halves are read `distance` half blocks apart."""
    count, size, _ = blocks.shape
    shape = x.shape
    if distance > 1:
        x = x.unflatten(-1, (count // distance, 2, distance, size // 2)).transpose(-2, -3)
    x = torch.einsum("...nk,nkc->...nc", x.reshape(*shape[:-1], count, size), blocks)
    if distance > 1:
        x = x.reshape(*shape[:-1], count // distance, distance, 2, size // 2).transpose(-2, -3)
    return x.reshape(shape)


def _legal_sizes(width: int, factors: int) -> list[int]:
    """Widths of blocks; with several factors they have halves, and 2^(m - 1) of them are mixed."""
    step = 2 ** (factors - 1)
    return [b for b in range(2, width + 1) if width % (b * step) == 0 and (factors == 1 or b % 2 == 0)]


METHOD = Method(
    PeftType.BOFT, BOFTConfig, BOFT, key_prefix="boft_", default_targets=usual_targets, train_options=all_linear
)
