"""One run per output folder: a lock that the system releases when the process ends, however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from deltatune.errors import SaveError, StateError

LOCK = ".run.lock"
OWNER = ".run.pid"


@contextmanager
def output_lock(output: Path) -> Iterator[None]:
    """Hold the output folder.

    Raises:
        StateError: Another process trains into it.
    """
    made = [path for path in (output, *output.parents) if not path.exists()]  # innermost first
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        owner = _owner(output)
        raise StateError(
            f"{output} is in use by another training run{owner}; wait for it, or choose another output_dir",
            path=str(output),
            field="output_dir",
        ) from None
    except OSError as error:
        raise SaveError(
            f"output_dir {output} cannot be written: {error.strerror or error}", path=str(output), field="output_dir"
        ) from error
    try:
        (output / OWNER).write_text(str(os.getpid()))
        yield
    finally:
        (output / OWNER).unlink(missing_ok=True)
        lock.release()
        (output / LOCK).unlink(missing_ok=True)
        for path in made:  # a run that was refused leaves nothing behind
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _owner(output: Path) -> str:
    try:
        return f" (process {(output / OWNER).read_text().strip()})"
    except OSError:
        return ""
