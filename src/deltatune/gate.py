"""`Gate`: passes of a model run side by side, and a change of its adapters happens while none of them is running."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from deltatune.errors import StateError


class Gate:
    """Whoever changes adapters waits for the passes that are running; passes that come meanwhile wait for the change.

    A pass within a pass of the same thread goes through.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._passes, self._changing = 0, False
        self._depth = threading.local()
        self._turn = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Gate, ()  # copies have a gate of their own

    @contextmanager
    def passing(self, choice: AbstractContextManager[Any]) -> Iterator[None]:
        """One pass, under its choice of adapters."""
        if self._within:
            with choice:
                yield
            return
        with self._free:
            self._free.wait_for(lambda: not self._changing)
            self._passes += 1
        self._depth.inside = True
        try:
            with choice:
                yield
        finally:
            self._depth.inside = False
            with self._free:
                self._passes -= 1
                self._free.notify_all()

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """One change after the other, so that each is worked out from what the last has left; passes go on.

        Raises:
            StateError: The thread is in a pass itself, which would never end.
        """
        if self._within:
            raise StateError("adapters cannot be swapped from within a forward pass; do it between two calls")
        with self._turn:
            yield

    @contextmanager
    def changing(self) -> Iterator[None]:
        """While nothing passes."""
        with self._free:
            self._changing = True
            self._free.wait_for(lambda: not self._passes)
        try:
            yield
        finally:
            with self._free:
                self._changing = False
                self._free.notify_all()

    @property
    def _within(self) -> bool:
        return getattr(self._depth, "inside", False)
