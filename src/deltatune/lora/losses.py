"""PEFT's names for what a training step adds to the loss, which training passes add by themselves here."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class PeerLosses:
    """For programs that add these to a loss of theirs: zero after a pass whose loss held the penalty already."""

    def _get_kasa_loss(self: Any, adapter_names: str | list[str] | None = None) -> Tensor | float:
        if self.loss_given:
            return 0.0
        penalty = self.penalty()
        return 0.0 if penalty is None else penalty

    _get_monteclora_loss = _get_kasa_loss
