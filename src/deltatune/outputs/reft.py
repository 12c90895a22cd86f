"""ReFT: h' = h + R^T (W h + b - R h) at chosen tokens of the prompt, R with orthonormal rows (LoReFT).

https://arxiv.org/abs/2404.03592
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltatune import checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.calls import Value
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError, StateError
from deltatune.factors import orthonormal_rows
from deltatune.methods.common import LayerConfig
from deltatune.outputs.places import DECODER_PLACES, PLACES, sees_targets
from deltatune.targets import transformer_layers


@config
class ReftConfig(LayerConfig):
    """LoReFT's options.

    Attributes:
        r: Dimensions of the subspace in which h is edited.
        first_n: How many tokens at the start of the prompt are edited; None for all of the prompt.
        last_n: How many at its end.
        target_modules: Blocks of layers, or layers; None for all transformer layers. The name of a list ("layers")
            stands for its members, of which `layers_to_transform` may choose.
    """

    r: int = 4
    first_n: int | None = 7
    last_n: int | None = 7

    def __post_init__(self) -> None:
        self.peft_type = PeftType.REFT
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("ReftConfig", "r", self.r)
        for name in ("first_n", "last_n"):
            if (count := getattr(self, name)) is not None and count < 0:
                checks.refuse("ReftConfig", name, count, "0 or more tokens, or None for all")
        if self.first_n == self.last_n == 0:
            checks.refuse("ReftConfig", "last_n", 0, "a token at the start or at the end of the prompt")


class LoReFT(Adapter):
    """Trainable: R (r, d), made orthonormal where it is used, W (r, d) and b (r)."""

    base_kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "block"})
    identity_at_birth: bool | str = "W and R are drawn apart from each other, as in the paper's code"
    mergeable: bool | str = "it edits some tokens and not others"
    pointwise: bool | str = "it edits some tokens and not others"
    reads: tuple[Value, ...] = (PLACES, DECODER_PLACES)
    views: ClassVar[tuple[str, ...]] = ("r", "first_n", "last_n")

    def __init__(self, width: int, r: int, first_n: int | None, last_n: int | None, in_decoder: bool) -> None:
        super().__init__()
        self.r, self.first_n, self.last_n, self.in_decoder = r, first_n, last_n, in_decoder
        self.reft_R = nn.Parameter(nn.init.orthogonal_(torch.empty(r, width)))
        self.reft_W = nn.Linear(width, r)

    @classmethod
    def build(cls, layer: LinearMap, config: ReftConfig, path: str) -> LoReFT:
        if config.r > layer.out_features:
            raise ConfigError(
                f"ReftConfig: r={config.r} orthonormal rows do not fit in the {layer.out_features} outputs of {path}",
                field="r",
                found=config.r,
                expected=layer.out_features,
            )
        return cls(layer.out_features, config.r, config.first_n, config.last_n, sees_targets(path))

    @property
    def R(self) -> Tensor:
        return orthonormal_rows(self.reft_R)

    def forward(
        self,
        x: Any,
        layer: LinearMap,
        places: Tensor | None = None,
        decoder_places: Tensor | None = None,
        **values: Any,
    ) -> Tensor:
        y = layer(x)
        chosen = self.chosen(y, decoder_places if self.in_decoder and decoder_places is not None else places)
        if chosen is None:
            return y
        R, W, b = (part.to(y.dtype) for part in (self.R, self.reft_W.weight, self.reft_W.bias))
        edit = (functional.linear(y, W, b) - functional.linear(y, R)) @ R
        return y + torch.where(chosen, edit, 0)

    def chosen(self, y: Tensor, places: Tensor | None) -> Tensor | None:
        """Which tokens of y (..., T, d) are edited, (..., T, 1); None for none of them.

        Args:
            places: (B or 1, T, 2) numbers of the prompt's tokens (`deltatune.outputs.places`). None where a layer knows
                of no tokens but those of its own output, all of which are the prompt then.
        """
        if places is None and y.ndim > 2:
            column = torch.arange(y.shape[-2], device=y.device)
            places = torch.stack([column, y.shape[-2] - 1 - column], dim=-1)
        elif places is None:  # one vector for each row
            return y.new_ones(1, dtype=torch.bool)
        elif places.shape[1] == 0:
            return None
        elif y.ndim == 2 and len(y) == places.shape[0] * places.shape[1]:  # tokens of all rows in one axis
            places = places.flatten(0, 1)
        elif y.ndim == 2 and places.shape[0] in (1, len(y)):  # of a pooler
            return y.new_ones(1, dtype=torch.bool)
        elif y.ndim != 3 or y.shape[1] != places.shape[1]:
            raise StateError(
                f"ReFT edits tokens of the prompt, but an adapted layer puts out {tuple(y.shape)} in a pass of "
                f"{places.shape[1]} tokens; target the transformer layers that see just these tokens",
                field="target_modules",
                found=tuple(y.shape),
                expected=places.shape[1],
            )
        first, last = places.unbind(-1)
        return (_below(first, self.first_n) | _below(last, self.last_n))[..., None]

    def extra_repr(self) -> str:
        return f"r={self.r}, first_n={self.first_n}, last_n={self.last_n}"


def _below(number: Tensor, limit: int | None) -> Tensor:
    return number >= 0 if limit is None else (number >= 0) & (number < limit)


METHOD = Method(
    PeftType.REFT,
    ReftConfig,
    LoReFT,
    key_prefix="reft_",
    find_targets=transformer_layers,
    learning_rate=9e-4,
)
