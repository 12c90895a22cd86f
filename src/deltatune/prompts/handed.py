"""`KeysValues`: what one attention gets from the prefixes: keys, values, and which of them each row of a batch sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class KeysValues(NamedTuple):
    """Learned keys and values of one site.

    Attributes:
        key: (heads, P, dim), the same for all rows; or (B, heads, P, dim) where the rows of a batch differ.
        value: The same, with the heads and the dim of values.
        visible: (B, P), True where a row sees the key; None where all rows see all.
    """

    key: Tensor
    value: Tensor
    visible: Tensor | None = None

    @property
    def count(self) -> int:
        """P, the number of keys."""
        return self.key.shape[-2]


def joined(parts: Sequence[tuple[Tensor, Tensor]]) -> KeysValues:
    """Several prefixes one after the other, for all rows."""
    if len(parts) == 1:
        return KeysValues(*parts[0])
    return KeysValues(torch.cat([key for key, _ in parts], dim=1), torch.cat([value for _, value in parts], dim=1))


def stacked(parts: Sequence[tuple[Tensor, Tensor] | None]) -> KeysValues:
    """One entry for each of `parts`, None without keys: padded to the longest, and what is padding is not visible."""
    lengths = [0 if part is None else part[0].shape[1] for part in parts]
    longest = max(lengths)
    like = next(part for part in parts if part is not None)

    def stack(index: int) -> Tensor:
        heads, _, dim = like[index].shape
        filled = [like[index].new_zeros(heads, 0, dim) if part is None else part[index] for part in parts]
        return torch.stack([pad(entry, (0, 0, 0, longest - entry.shape[1])) for entry in filled])

    device = like[0].device
    visible = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
    return KeysValues(stack(0), stack(1), visible)
