"""Whether DoRA may keep the norms of its weights from call to call in evaluation.

Methods ask `dora_caching()`. A choice for a block belongs to the thread or task that makes it.
"""

from __future__ import annotations

from contextvars import ContextVar, Token

_in_block: ContextVar[bool | None] = ContextVar("deltatune_dora_caching", default=None)
_standing = False


def dora_caching() -> bool:
    """Whether weights' norms may be kept now, outside of training."""
    chosen = _in_block.get()
    return _standing if chosen is None else chosen


class DoraCaching:
    """Let DoRA keep the norms of its weights in evaluation: faster, for one number per output feature and layer.

    `with DoraCaching(): ...` does so within the block, `DoraCaching()(enabled=True)` from now on in the whole process.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._tokens: list[Token[bool | None]] = []  # one object may be entered again inside of itself

    def __enter__(self) -> None:
        self._tokens.append(_in_block.set(self.enabled))

    def __exit__(self, *failure: object) -> None:
        _in_block.reset(self._tokens.pop())

    def __call__(self, enabled: bool = True) -> None:
        global _standing
        _standing = enabled
