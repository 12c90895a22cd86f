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
_whole: ContextVar[bool] = ContextVar("deltatune_filling_all", default=False)


@contextmanager
def filled_from(source: Source, whole: bool = False) -> Iterator[None]:
    """
    Args:
        whole: The file brings every number or is refused, so that none need be drawn.
    """
    tokens = _source.set(source), _whole.set(whole)
    try:
        yield
    finally:
        _source.reset(tokens[0])
        _whole.reset(tokens[1])


def brings_all() -> bool:
    return _whole.get()


def source() -> Source:
    return _source.get()
