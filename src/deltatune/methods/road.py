"""RoAd: W' = R W, b' = R b, R turns and scales pairs of outputs in their plane.   https://arxiv.org/abs/2409.00119"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError
from deltatune.methods.common import LayerConfig, all_linear

_NUMBERS = {"road_1": 1, "road_2": 2, "road_4": 4}  # angles of one pair, and as many scales


@config
class RoadConfig(LayerConfig):
    """RoAd's options, with PEFT's names and defaults.

    Attributes:
        variant: "road_1": one angle and one scale for each pair of outputs. "road_2": one of each for every output.
            "road_4": one of each for every entry of the 2 x 2 matrices.
        group_size: The outputs are cut into groups of this size; output i of a group makes a pair with output
            i + group_size / 2.
        init_weights: True starts as the identity; False random.
    """

    beyond_peer: ClassVar[frozenset[str]] = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})

    variant: str = "road_1"
    group_size: int = 64
    init_weights: bool = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.ROAD
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.one_of("RoadConfig", "variant", self.variant, tuple(_NUMBERS))
        if self.group_size < 2 or self.group_size % 2:
            checks.refuse("RoadConfig", "group_size", self.group_size, "an even number of 2 or more")


class Road(Adapter):
    """Trainable: angles theta and scales alpha, 1, 2 or 4 of each for a pair of outputs."""

    stacks = ("variant", "group_size")
    views: ClassVar[tuple[str, ...]] = ("road_theta", "road_alpha", "variant", "group_size")

    def __init__(self, layer: LinearMap, variant: str, group_size: int, identity: bool) -> None:
        super().__init__()
        self.variant, self.group_size = variant, group_size
        count = layer.out_features // 2 * _NUMBERS[variant]
        self.axis = 1 - len(layer.up_shape(1))  # of the outputs: behind a convolution's come the positions
        if identity:
            theta, alpha = torch.zeros(count), torch.ones(count)
        else:
            theta, alpha = 0.5 * torch.randn(count), 1 + 0.5 * torch.randn(count)
            self.identity_at_birth = "init_weights=False draws angles and scales"
        self.road_theta, self.road_alpha = nn.Parameter(theta), nn.Parameter(alpha)

    @classmethod
    def build(cls, layer: LinearMap, config: RoadConfig, path: str) -> Road:
        width, size = layer.out_features, config.group_size
        if width % size:
            legal = [n for n in range(2, width + 1, 2) if width % n == 0]
            near = min(legal, key=lambda n: abs(n - size), default=None)
            advice = f"the nearest value that does is {near}" if near else "an odd number makes no pairs, leave it out"
            raise ConfigError(
                f"RoadConfig: group_size={size} does not divide the {width} outputs of {path}; {advice}",
                field="group_size",
                path=path,
                found=size,
                expected=near,
            )
        return cls(layer, config.variant, size, config.init_weights)

    def _numbers(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """What stands on the diagonal of R for each output, and what beside it."""
        half = self.group_size // 2
        if self.variant == "road_1":  # both outputs of a pair share it
            both = entries.unflatten(-1, (-1, 1, half)).expand(*[-1] * entries.ndim, 2, half).flatten(-3)
            return both, both
        if self.variant == "road_2":
            return entries, entries
        diagonal, beside = entries.unflatten(-1, (-1, 2, self.group_size)).unbind(-2)
        return diagonal.flatten(-2), beside.flatten(-2)

    def entries(self) -> tuple[Tensor, Tensor]:
        """alpha cos(theta) - 1, without the one of the identity, and alpha sin(theta), for each output."""
        (turn, turn_beside), (size, size_beside) = self._numbers(self.road_theta), self._numbers(self.road_alpha)
        return size * turn.cos() - 1, size_beside * turn_beside.sin()

    def partners(self, y: Tensor, axis: int) -> Tensor:
        """-b in the place of a, and a in the place of b, for every pair (a, b)."""
        axis = axis % y.ndim
        a, b = y.unflatten(axis, (-1, 2, self.group_size // 2)).unbind(axis + 1)
        return torch.stack((-b, a), dim=axis + 1).flatten(axis, axis + 2)

    def adapt(self, weight: Tensor) -> Tensor:
        own, partners = self.entries()
        return weight + own[:, None] * weight + partners[:, None] * self.partners(weight, 0)

    def adapt_bias(self, bias: Tensor | None) -> Tensor | None:
        if bias is None:
            return None
        own, partners = self.entries()
        return bias + own * bias + partners * self.partners(bias, 0)

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        y, (own, partners) = layer(x), self.entries()
        # y is added, not multiplied by 1 + own: near the identity half precision would round the change away
        return y + layer.scale(y, own) + layer.scale(self.partners(y, self.axis), partners)

    def extra_repr(self) -> str:
        return f"variant={self.variant!r}, group_size={self.group_size}"


METHOD = Method(
    PeftType.ROAD,
    RoadConfig,
    Road,
    key_prefix="road_",
    default_targets=usual_targets,
    learning_rate=3e-3,
    train_options=all_linear,
)
