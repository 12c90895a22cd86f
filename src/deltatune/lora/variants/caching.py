"""Whether DoRA may keep the lengths of its weights' rows from call to call, in evaluation without gradients.

A choice for a block belongs to the thread or task that makes it. What is kept is worked out again when the adapter
trains or is loaded, and when torch has counted a change of a tensor it depends on, which it does for all changes but
those made through `tensor.data`.
"""

from __future__ import annotations

from contextvars import ContextVar, Token

_in_block: ContextVar[bool | None] = ContextVar("deltatune_dora_caching", default=None)
_standing = False


def dora_caching() -> bool:
    chosen = _in_block.get()
    return _standing if chosen is None else chosen


class DoraCaching:
    """Let DoRA keep these lengths in evaluation: faster, for one number per output feature of a layer.

    `with DoraCaching(): ...` does so within the block, `DoraCaching()(enabled=True)` from now on in the whole process.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._tokens: list[Token[bool | None]] = []  # one object may be entered again inside of itself

    def __enter__(self) -> DoraCaching:
        self._tokens.append(_in_block.set(self.enabled))
        return self

    def __exit__(self, *error: object) -> None:
        _in_block.reset(self._tokens.pop())

    def __call__(self, enabled: bool = True) -> None:
        global _standing
        _standing = enabled
