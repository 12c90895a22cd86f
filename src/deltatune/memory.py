"""Memory that runs out, told as what it is, whichever allocator noticed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deltatune.errors import OutOfMemoryError

SMALLER = "the model is as it was; use a smaller rank or number of virtual tokens, or fewer targets"


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no memory left; the CPU's allocator has no class of its own for it."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
    )


@contextmanager
def told(what: str, hint: str) -> Iterator[None]:
    """Turn such an error of the block into OutOfMemoryError; the block itself puts back what it changed."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, OutOfMemoryError) or not ran_out(error):
            raise
        reason = next(iter(str(error).splitlines()), "") or "no memory left"
        raise OutOfMemoryError(f"out of memory while {what} ({reason}); {hint}", found=reason, hint=hint) from error
