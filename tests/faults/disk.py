"""A disk that fails at the n-th operation: an error, once or from then on, or the death of the process."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# What writing files is made of. Each call of one of these under the watched folder is one operation.
OPERATIONS = ("mkdir", "rename", "replace", "unlink", "rmdir", "chmod", "fsync", "link", "symlink")


class Disk:
    """Counts operations; from the n-th on `act` is called in their place, or only at the n-th.

    Attributes:
        count: Operations so far.
        log: Their names.
    """

    def __init__(self, at: int, act: Callable[[str], None], sticky: bool) -> None:
        self.at, self.act, self.sticky = at, act, sticky
        self.count, self.log = 0, []

    def step(self, name: str) -> None:
        self.count += 1
        self.log.append(name)
        if self.count == self.at or (self.sticky and self.count > self.at):
            self.act(name)


@contextmanager
def failing_disk(at: int, act: Callable[[str], None], sticky: bool = False) -> Iterator[Disk]:
    """Inside of the block files are opened for writing, written, synced, renamed and removed through a `Disk`."""
    disk = Disk(at, act, sticky)
    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, _counted(disk, name, getattr(os, name)))
        opened = builtins.open

        def opening(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wxa+"):
                return opened(file, mode, *args, **kwargs)
            disk.step("open")
            return _File(opened(file, mode, *args, **kwargs), disk)

        patch.setattr(builtins, "open", opening)
        patch.setattr(io, "open", opening)
        yield disk


def _counted(disk: Disk, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        disk.step(name)
        return call(*args, **kwargs)

    return counted


class _File:
    """An open file whose writes are operations; one that fails has written half."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def write(self, content: Any) -> int:
        try:
            self.disk.step("write")
        except BaseException:
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            raise
        return self.file.write(content)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()

    def __iter__(self) -> Any:
        return iter(self.file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def raising(code: int) -> Callable[[str], None]:
    def act(name: str) -> None:
        raise OSError(code, os.strerror(code))

    return act


def die(name: str) -> None:
    """As SIGKILL: nothing is caught, nothing tidied up, buffers are lost."""
    os._exit(137)


def in_child(call: Callable[[], None]) -> int:
    """The exit code of a forked child that calls it; 0 when it returned, 1 when it raised."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            call()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
