"""`Gate`: passes of a model run side by side, and what they use of its adapters does not change under them."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from deltatune.errors import StateError

Uses = frozenset[str]
STANDING = ""  # what a pass without a choice of its own uses besides: that of the model (no adapter has this name)


@dataclass(eq=False)
class _Change:
    names: Uses | None  # None: everything
    begun: bool = False  # it has stopped waiting

    def meets(self, used: Uses) -> bool:
        return self.names is None or not self.names.isdisjoint(used)


class _Own(threading.local):
    """Of this thread: what each of its running passes uses, and the changes it makes, innermost last."""

    def __init__(self) -> None:
        self.passes: list[Uses] = []
        self.changes: list[_Change] = []


class _Pass:
    """A block of `Gate.passing`; no generator, whose machinery takes longer than the rest, once per token."""

    __slots__ = ("choice", "chosen", "gate", "used", "uses")

    def __init__(self, gate: Gate, uses: Callable[[], Uses], choice: Callable[[], AbstractContextManager[Any]]) -> None:
        self.gate, self.uses, self.choice = gate, uses, choice

    def __enter__(self) -> None:
        self.used = self.gate.begins(self.uses)
        try:
            self.chosen = self.choice()
            self.chosen.__enter__()
        except BaseException:
            self.gate.ends(self.used)
            raise

    def __exit__(self, *error: Any) -> bool | None:
        try:
            return self.chosen.__exit__(*error)
        finally:
            self.gate.ends(self.used)


class Gate:
    """Whoever changes adapters waits for the running passes that use them; such passes that come later wait for it.

    One change goes on at a time. Passes of other adapters are not held up by it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._free = threading.Condition(self._lock)  # entered through the lock itself where nobody waits
        self._passes: list[Uses] = []
        self._change: _Change | None = None
        self._turn = threading.RLock()
        self._own = _Own()
        _GATES.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Gate, ()  # copies have a gate of their own

    def passing(self, uses: Callable[[], Uses], choice: Callable[[], AbstractContextManager[Any]]) -> _Pass:
        """One pass. What it uses, and its choice of adapters, are asked for once the way is free."""
        return _Pass(self, uses, choice)

    def begins(self, uses: Callable[[], Uses]) -> Uses:
        """Wait for the way to be free; what `ends` is to be told."""
        with self._lock:
            if self._change is not None:
                self._free.wait_for(lambda: self._open(uses()))
            used = uses()
            self._passes.append(used)
            self._own.passes.append(used)
        return used

    def ends(self, used: Uses) -> None:
        with self._lock:
            self._passes.remove(used)
            self._own.passes.remove(used)
            if self._change is not None:  # or nobody waits
                self._free.notify_all()

    def alone(self) -> None:
        """In a process that was just forked: the passes and changes of the threads that it does not have never end."""
        if not self._own.changes:
            self._lock, self._turn, self._change = threading.RLock(), threading.RLock(), None
            self._free = threading.Condition(self._lock)
            self._passes = list(self._own.passes)

    def _open(self, used: Uses) -> bool:
        change = self._change
        if change is None or change in self._own.changes or not change.meets(used):
            return True
        return bool(self._own.passes) and not change.begun  # it may be waiting for the pass that this one is part of

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """One change after the other, so that each is worked out from what the last has left; passes go on.

        Raises:
            StateError: The thread is in a pass itself, which would never end.
        """
        if self._own.passes:
            raise StateError(
                "adapters cannot be swapped from within a forward pass; do it between two calls",
                found="a forward pass",
                expected="no pass of this thread",
                hint="swap between two calls",
            )
        with self._turn:
            yield

    @contextmanager
    def changing(self, names: Iterable[str] | None = None) -> Iterator[None]:
        """While no pass runs that uses one of these names; None: while no pass runs.

        Raises:
            StateError: The thread is in a pass itself, and so are others, which might wait for it in turn.
        """
        change, own = _Change(None if names is None else frozenset(names)), self._own
        if own.passes and not self._turn.acquire(blocking=False):
            raise _within()
        if not own.passes:
            self._turn.acquire()
        outer = self._change
        try:
            with self._free:
                if own.passes and self._others(change):
                    raise _within()
                self._change = change
                own.changes.append(change)
                self._free.notify_all()  # passes within passes that a change around this one held up
                self._free.wait_for(lambda: not self._others(change))
                change.begun = True
            yield
        finally:
            with self._free:
                self._change = outer
                if change in own.changes:
                    own.changes.remove(change)
                self._free.notify_all()
            self._turn.release()

    def _others(self, change: _Change) -> bool:
        """Whether passes of other threads use what is to be changed."""
        count = sum(change.meets(used) for used in self._passes)
        return count > sum(change.meets(used) for used in self._own.passes)


_GATES: weakref.WeakSet[Gate] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [gate.alone() for gate in list(_GATES)])


def _within() -> StateError:
    return StateError(
        "adapters cannot be changed from within a forward pass while other threads run passes; do it between two calls"
    )
