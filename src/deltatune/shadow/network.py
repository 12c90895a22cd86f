"""ShadowPEFT: a small transformer runs beside the frozen decoder, and every block reads from its state s.

    s_0     = P backbone(x)                                      the shadow's view of the tokens
    h'      = h_{l-1} + alpha  W_up W_down (h_{l-1} - s_{l-1})   before block l
    h_l     = block_l(h')
    s_l     = (1 - g) s_{l-1} + g T(h_l),   g = sigmoid(G(h_l))  after it

The way of a pass through these four lines is in `deltatune.shadow.stage`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Crossing(nn.Module):
    """What one block trades with the shadow: h' on the way in, s_l on the way out.

    Behind the last block nobody reads s any more, so that `last` has no update (PEFT keeps one, which never learns).
    """

    def __init__(
        self, width: int, r: int, inner: int, alpha: float, dropout: float, zero: bool, last: bool = False
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.shadow_dropout = nn.Dropout(dropout)
        self.shadow_down = nn.Linear(width, r, bias=False)
        self.shadow_up = nn.Linear(r, width, bias=False)
        self.shadow_update_transform = None if last else _two_layers(width, inner)
        self.shadow_update_gate = None if last else _two_layers(width, inner)
        if zero:
            nn.init.zeros_(self.shadow_up.weight)

    def inject(self, h: Tensor, s: Tensor) -> Tensor:
        difference = (h - s).to(self.shadow_down.weight.dtype)
        update = self.shadow_up(self.shadow_down(self.shadow_dropout(difference)))
        return h + (self.alpha * update).to(h.dtype)

    def update(self, h: Tensor, s: Tensor) -> Tensor:
        if self.shadow_update_gate is None or self.shadow_update_transform is None:
            return s
        h = h.to(self.shadow_down.weight.dtype)
        gate = torch.sigmoid(self.shadow_update_gate(h))
        return ((1 - gate) * s.to(h.dtype) + gate * self.shadow_update_transform(h)).to(s.dtype)


def _two_layers(width: int, inner: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


class ShadowNetwork(nn.Module):
    """All that one adapter trains.

    Attributes:
        shadow_backbone: The small transformer; without its table of embeddings where it reads the base's.
        shadow_projection: P, from its width to the base's; None where they are equal.
        shadow_head: A classifier's head of its own, for the auxiliary loss; None elsewhere.
        crossings: One `Crossing` per block, by the block's number.
    """

    def __init__(
        self,
        backbone: nn.Module,
        projection: nn.Linear | None,
        head: nn.Module | None,
        crossings: dict[int, Crossing],
    ) -> None:
        super().__init__()
        self.shadow_backbone = backbone
        self.shadow_projection = projection
        self.shadow_head = head
        self.crossings = nn.ModuleDict({str(number): crossing for number, crossing in crossings.items()})

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.shadow_backbone.parameters())).dtype

    def forward(self, **inputs: Any) -> Tensor:
        """s_0 (B, T, width of the base)."""
        s = self.shadow_backbone(**inputs, return_dict=True).last_hidden_state
        return s if self.shadow_projection is None else self.shadow_projection(s)
