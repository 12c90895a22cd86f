"""Whether adapters that are being built are about to be filled from a file, and who wrote it.

A start that needs data has none then: its tensors come from the file. What another program's file leaves out may mean
something else than what ours does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum


class Source(Enum):
    NONE = "a fresh adapter"
    OWN = "a file that we wrote"
    PEER = "a file of another program"


_source: ContextVar[Source] = ContextVar("deltatune_filling", default=Source.NONE)


@contextmanager
def filled_from(source: Source) -> Iterator[None]:
    token = _source.set(source)
    try:
        yield
    finally:
        _source.reset(token)


def source() -> Source:
    return _source.get()
