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
        unsynced: Files with content that is not on the disk yet.
        unnamed: Folders in which a file has got a name that is not.
    """

    def __init__(self, at: int, act: Callable[[str], None], sticky: bool) -> None:
        self.at, self.act, self.sticky = at, act, sticky
        self.count, self.log = 0, []
        self.unsynced: set[str] = set()
        self.unnamed: dict[str, str] = {}

    def done(self, name: str, *args: Any) -> None:
        """What an operation that went well means for what a power failure leaves."""
        if name == "fsync":
            path = os.readlink(f"/proc/self/fd/{args[0]}") if os.path.exists("/proc/self/fd") else ""
            self.unsynced.discard(path)
            self.unnamed = {target: folder for target, folder in self.unnamed.items() if folder != path}
        elif name in ("rename", "replace"):
            source, target = (os.path.realpath(path) for path in args[:2])
            inside = {path for path in self.unsynced if path == source or path.startswith(f"{source}/")}
            self.unsynced = (self.unsynced - inside) | {target + path[len(source) :] for path in inside}
            self.unnamed[target] = os.path.dirname(target)

    def loses_power(self) -> None:
        """What was written and not synced is gone; names are there, as file systems that order these leave it."""
        for path in filter(os.path.exists, self.unsynced):
            os.truncate(path, 0)

    def all_on_it(self) -> bool:
        """Whether nothing that is still there would be lost."""
        return not any(map(os.path.exists, (*self.unsynced, *self.unnamed)))

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
        result = call(*args, **kwargs)
        disk.done(name, *args)
        return result

    return counted


class _File:
    """An open file whose writes are operations; one that fails has written half."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def write(self, content: Any) -> int:
        self.disk.unsynced.add(os.path.realpath(self.file.name))
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
