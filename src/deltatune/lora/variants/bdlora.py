"""BD-LoRA: A or B is block-diagonal, so that shards of a layer need not talk.   https://arxiv.org/abs/2510.23346"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from deltatune import checks
from deltatune.adapter import LinearMap
from deltatune.errors import ConfigError
from deltatune.factors import block_diagonal
from deltatune.lora.variants.options import Options
from deltatune.lora.variants.qalora import DRAWN
from deltatune.lora.variants.variant import Variant


@dataclass
class BdLoraConfig(Options):
    """BD-LoRA's options, with PEFT's names and defaults.

    Attributes:
        target_modules_bd_a: Parts of the paths of layers whose A is block-diagonal: those that are sharded by rows.
        target_modules_bd_b: Likewise for B: those that are sharded by columns (q, k, v, up, gate).
        nblocks: Number of blocks; it divides the rank and the side of the layer that is cut.
        match_strict: A layer that neither list names is an error instead of plain LoRA.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def validate(self) -> None:
        checks.positive_int("BdLoraConfig", "nblocks", self.nblocks)
        for name in ("target_modules_bd_a", "target_modules_bd_b"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, str) or not checks.fits(value, list[str])):
                checks.refuse("BdLoraConfig", name, value, "a list of parts of layer names, or None")
        both = set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ())
        if both:
            checks.refuse("BdLoraConfig", "target_modules_bd_b", sorted(both), "names that target_modules_bd_a has not")


class BlockDiagonal(Variant):
    """The trained A is (r, in / n), or the trained B (out, r / n): the blocks, one below the other."""

    field: ClassVar[str] = "use_bdlora"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    starts: ClassVar[tuple[Any, ...] | None] = DRAWN

    def __init__(self, blocks: int, in_a: bool) -> None:
        super().__init__()
        self.blocks, self.in_a = blocks, in_a

    @classmethod
    def build(cls, layer: LinearMap, config: Any, path: str, r: int) -> BlockDiagonal | None:
        options: BdLoraConfig = config.use_bdlora
        in_a, in_b = (
            any(part in path for part in parts or ())
            for parts in (options.target_modules_bd_a, options.target_modules_bd_b)
        )
        if in_a and in_b:
            raise _unfit(f"both target_modules_bd_a and target_modules_bd_b name {path}", path)
        if not (in_a or in_b):
            if options.match_strict:
                raise _unfit(
                    f"neither target_modules_bd_a nor target_modules_bd_b names {path}; name it, or set "
                    "match_strict=False to give it plain factors",
                    path,
                )
            return None
        width = layer.in_features // (config.qalora_group_size if config.use_qalora else 1)
        for what, size in (("rank", r), ("inputs", width) if in_a else ("outputs", layer.out_features)):
            if size % options.nblocks:
                raise _unfit(f"nblocks={options.nblocks} does not divide the {what} ({size}) of {path}", path)
        return cls(options.nblocks, in_a)

    def down_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], shape[1] // self.blocks) if self.in_a else shape

    def up_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if self.in_a else (shape[0], shape[1] // self.blocks)

    def down(self, A: Tensor) -> Tensor:
        return block_diagonal(A, self.blocks) if self.in_a else A

    def up(self, B: Tensor) -> Tensor:
        return B if self.in_a else block_diagonal(B, self.blocks)


def _unfit(what: str, path: str) -> ConfigError:
    return ConfigError(f"LoraConfig: use_bdlora: {what}", field="use_bdlora", path=path)
