"""Rows of one batch with different adapters, in a module that is given tokens and their routing instead of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deltatune.selection import by_adapter


def tokens_of(args: tuple, kwargs: dict[str, Any], rows: int) -> int | None:
    """How many tokens each row of the batch has, row after row; None where the module's input does not tell.

    Experts are told by index which of them each token goes to (tokens, k). Then what they put out for a token depends
    on that token alone, and a batch may be taken apart by token.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    routed = any(value.ndim == 2 and not value.is_floating_point() for value in tensors)
    lengths = {len(value) if value.ndim else 0 for value in tensors}
    if not routed or len(lengths) != 1:
        return None
    (length,) = lengths
    return None if length == 0 or length % rows else length // rows


def by_token(
    names: Sequence[str | None],
    run: Callable[[str | None, tuple, dict[str, Any]], Tensor],
    args: tuple,
    kwargs: dict[str, Any],
) -> Tensor:
    """What `run` makes of the tokens of each name."""
    device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))

    def chosen(name: str | None, index: list[int]) -> Tensor:
        places = torch.tensor(index, device=device)

        def of(value: Any) -> Any:
            return value[places] if isinstance(value, Tensor) else value

        return run(name, tuple(map(of, args)), {key: of(value) for key, value in kwargs.items()})

    return by_adapter(tuple(names), chosen, device)
