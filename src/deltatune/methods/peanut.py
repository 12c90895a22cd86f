"""PEANuT: W' = W + s B net(A W), a small network over the frozen weight itself.   https://arxiv.org/abs/2410.01870"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import checks
from deltatune.activations import ACTIVATIONS
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError
from deltatune.factors import Factor
from deltatune.methods.common import LayerConfig, all_linear


@config
class PeanutConfig(LayerConfig):
    """PEANuT's options, with PEFT's names and defaults.

    Attributes:
        r: Width of the network.
        depth: Layers of the network beside A and B: so many encoders, and so many decoders, which take the encoders'
            inputs as residuals.
        act_fn: Its activation, by the name that transformers has for it.
        scaling: The s of the equation.
        init_weights: True: B zero, the rest uniform (Kaiming). False: B too, so a fresh adapter changes the output.
    """

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.PEANUT
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("PeanutConfig", "r", self.r)
        if self.depth < 0:
            checks.refuse("PeanutConfig", "depth", self.depth, "an integer of 0 or more")
        checks.finite_positive("PeanutConfig", "scaling", self.scaling)
        if self.act_fn in ("prelu", "xielu"):
            raise ConfigError(
                f"PeanutConfig: act_fn={self.act_fn!r} has parameters of its own, which files have no name for; "
                "use 'leaky_relu' or 'silu'",
                field="act_fn",
                found=self.act_fn,
                expected=sorted(ACTIVATIONS),
            )
        checks.one_of("PeanutConfig", "act_fn", self.act_fn, tuple(ACTIVATIONS))


class Peanut(Adapter):
    """Trainable: A (r, out), B (out, r), and 2 depth matrices (r, r)."""

    bounded_r: ClassVar[bool] = False  # the width of a network may exceed that of its input
    views: ClassVar[tuple[str, ...]] = (
        *("peanut_A", "peanut_B", "peanut_encoders", "peanut_decoders"),
        *("r", "depth", "scaling", "act_fn"),
    )

    peanut_A: Factor
    peanut_B: Factor

    def __init__(self, layer: LinearMap, r: int, depth: int, act_fn: str, scaling: float, zeros: bool) -> None:
        super().__init__()
        self.r, self.depth, self.act_fn, self.scaling = r, depth, act_fn, scaling
        self.kind = layer.kind
        self.peanut_A = Factor(r, layer.out_features)
        self.peanut_B = Factor(layer.out_features, r)
        self.peanut_encoders = nn.ModuleList([Factor(r, r) for _ in range(depth)])
        self.peanut_decoders = nn.ModuleList([Factor(r, r) for _ in range(depth)])
        for weight in self.parameters():
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # as nn.Linear does
        if zeros:
            nn.init.zeros_(self.peanut_B.weight)
        else:
            self.identity_at_birth = "init_weights=False draws B"

    @classmethod
    def build(cls, layer: LinearMap, config: PeanutConfig, path: str) -> Peanut:
        return cls(layer, config.r, config.depth, config.act_fn, config.scaling, config.init_weights)

    def net(self, columns: Tensor) -> Tensor:
        """The network without B, over each column of a weight: (out, n) -> (r, n)."""
        act = ACTIVATIONS[self.act_fn]
        z = act(self.peanut_A.weight.to(columns.dtype) @ columns)
        residuals = []
        for encoder in self.peanut_encoders:
            residuals.append(z)
            z = act(encoder.weight.to(z.dtype) @ z)  # type: ignore[operator]
        for decoder in self.peanut_decoders:
            z = act(decoder.weight.to(z.dtype) @ z) + residuals.pop()  # type: ignore[operator]
        return z

    def adapt(self, weight: Tensor) -> Tensor:
        B = self.peanut_B.weight
        wide = weight.to(torch.promote_types(weight.dtype, B.dtype))
        return wide + self.scaling * (B @ self.net(wide).to(B.dtype))

    def low_rank(self, layer: LinearMap) -> tuple[Tensor, Tensor]:
        B = self.peanut_B.weight
        return self.scaling * B, self.net(layer.weight.to(torch.promote_types(layer.dtype, B.dtype))).to(B.dtype)

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        y, B = layer(x), self.peanut_B.weight
        # A W first: a product with r rows instead of the out x in of B net(A W); then x through its r outputs.
        if self.kind == "embedding" and layer.bias is None:
            # the columns of W that are asked for are what the layer gives, before its own factor
            factor = layer.apply(x, B.new_ones(1, layer.in_features)).to(y.dtype)
            columns = (y / factor).reshape(-1, y.shape[-1]).T
            h = self.net(columns).T.view(*y.shape[:-1], self.r) * factor
        else:
            h = layer.apply(x, self.net(layer.weight))
        return y + self.scaling * layer.mix(h, B).to(y.dtype)


METHOD = Method(
    PeftType.PEANUT,
    PeanutConfig,
    Peanut,
    key_prefix="peanut_",
    default_targets=usual_targets,
    learning_rate=2e-3,
    train_options=all_linear,
)
