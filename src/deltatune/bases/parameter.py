"""A new parameter in the place of another."""

from __future__ import annotations

from torch import Tensor, nn


def like(value: Tensor, old: Tensor) -> nn.Parameter:
    """`value` in the precision of `old`, and trained as that was."""
    return nn.Parameter(value.detach().to(old.dtype).clone(), requires_grad=old.requires_grad)
