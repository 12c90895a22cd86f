"""QA-LoRA: A reads sums over groups of g inputs, as a quantised layer has one scale for each.

y = W x + (alpha / r) B A x', x'_j = (in / g) mean of the inputs in group j.   https://arxiv.org/abs/2309.14717
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from deltatune import checks
from deltatune.adapter import LinearMap
from deltatune.errors import ConfigError
from deltatune.lora.variants.variant import Variant

# The trained A is drawn, not worked out from a weight or from activations, whose inputs are not in groups.
DRAWN = (True, False, None, "gaussian")


class GroupPooled(Variant):
    """The trained A is (r, in / g); behind it stands a matrix of which all columns of a group are equal."""

    field: ClassVar[str] = "use_qalora"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    starts: ClassVar[tuple[Any, ...] | None] = DRAWN
    views: ClassVar[tuple[str, ...]] = ("qalora_group_size",)

    def __init__(self, group: int, in_features: int) -> None:
        super().__init__()
        self.qalora_group_size = group
        self.groups = in_features // group

    @classmethod
    def check(cls, config: Any) -> None:
        checks.positive_int("LoraConfig", "qalora_group_size", config.qalora_group_size)

    @classmethod
    def build(cls, layer: LinearMap, config: Any, path: str, r: int) -> GroupPooled:
        size, width = config.qalora_group_size, layer.in_features
        if width % size:
            legal = [n for n in range(1, width + 1) if width % n == 0]
            near = min(legal, key=lambda n: abs(n - size))
            raise ConfigError(
                f"LoraConfig: qalora_group_size={size} does not divide the {width} inputs of {path}; "
                f"the nearest value that does is {near}",
                field="qalora_group_size",
                path=path,
                found=size,
                expected=near,
            )
        return cls(size, width)

    def down_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], shape[1] // self.qalora_group_size)

    def down(self, A: Tensor) -> Tensor:
        return (A * (self.groups / self.qalora_group_size)).repeat_interleave(self.qalora_group_size, dim=1)
