"""What is not deltatune runs as if deltatune were not there: its hook in attention is one for the whole process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from deltatune.prompts import attention


@contextmanager
def as_if_alone(package: str) -> Iterator[None]:
    if package == "deltatune":
        yield
        return
    attention.uninstall()
    try:
        yield
    finally:
        attention.install()
