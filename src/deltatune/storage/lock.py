"""Who writes into a folder: one saver at a time, of all threads and processes of a machine.

The lock is the system's, on the folder itself: it leaves no file behind, and it ends with the process that holds it,
however that ends. Where a file system has no such locks (some network mounts, Windows), savers do not wait for each
other; what is read then is still whole, because one file is the commit point (`deltatune.storage.folder`).
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from deltatune.errors import SaveError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PATIENCE = 120.0  # seconds; a save of gigabytes to a slow disk ends within that
PAUSE = 0.02  # seconds between two looks


@contextmanager
def locked(folders: Iterable[Path]) -> Iterator[None]:
    """Hold all of `folders`, which are there. Always in one order, so that two who want the same two do not starve.

    Raises:
        SaveError: Another holds one of them and does not end.
    """
    with ExitStack() as stack:
        if fcntl is not None:
            for folder in sorted({folder.resolve() for folder in folders}):
                stack.enter_context(_held(folder))
        yield


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    assert fcntl is not None  # `locked` has asked
    handle, held = _taken(folder, time.monotonic() + PATIENCE)
    try:
        yield
    finally:
        if held:  # by word: a process that was forked meanwhile has the handle too, and closing leaves it locked
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _taken(folder: Path, deadline: float) -> tuple[int, bool]:
    """The handle, to be closed, and whether it is held."""
    while True:
        handle = _open(folder)
        try:
            held = _take(handle, folder, deadline)
            if not held or _is_still(handle, folder):
                return handle, held
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # a saver that was refused has removed the folder it had made


def _open(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    return os.open(folder, os.O_RDONLY | os.O_CLOEXEC)


def _take(handle: int, folder: Path, deadline: float) -> bool:
    """Whether it is held: not so where the file system cannot."""
    assert fcntl is not None
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EINTR):
                return False
        if time.monotonic() > deadline:
            raise SaveError(
                f"{folder} is being saved to by another{_owner(handle)} for more than {PATIENCE:g} s; nothing was "
                "written; end that one, or choose another folder",
                path=str(folder),
                hint="end the other process, or choose another folder",
            )
        time.sleep(PAUSE)


def _is_still(handle: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(folder))
    except OSError:
        return False


def _owner(handle: int) -> str:
    """The process that holds it, as Linux tells it."""
    facts = os.fstat(handle)
    place = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}:{facts.st_ino}"
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return ""
    return next((f" (process {parts[4]})" for line in lines if (parts := line.split())[5:6] == [place]), "")
