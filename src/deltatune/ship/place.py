"""A folder that is there whole or not at all: made beside its place, proven there, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from deltatune.errors import PeftError, SaveError
from deltatune.storage.files import sync

CARRIED = ("settings.json", "labels.json", "metrics.json")  # how inputs were written, names of classes, the run


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to fill; it becomes `out` when the block ends well, and is removed when it does not.

    Raises:
        SaveError: There is something at `out` already, or it cannot be written.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SaveError(f"{out} is there already; give a folder that does not exist, or remove it", path=str(out))
    made = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        made.mkdir(parents=True)
        yield made
        for path in [*made.rglob("*"), made]:  # on the disk before it has its name: a power cut leaves no empty files
            sync(path)
        if target.exists():
            target.rmdir()
        os.replace(made, target)
        with suppress(OSError):  # all is in place; some file systems cannot sync a folder
            sync(target.parent)
    except PeftError:
        raise  # some of ours are OSErrors too
    except OSError as error:
        raise SaveError(
            f"{error.filename or out}: cannot be written: {error.strerror or error}; nothing is left of it",
            path=str(out),
            found=error.errno,
            hint="make room, or choose another folder",
        ) from error
    except SafetensorError as error:  # what transformers writes models with; its errors of the disk are no OSErrors
        raise SaveError(
            f"{out}: cannot be written: {error}; nothing is left of it",
            path=str(out),
            hint="make room, or choose another folder",
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def carry(adapter: str, folder: Path) -> None:
    """What says how to use the adapter goes with what is made of it."""
    for name in CARRIED:
        source = Path(adapter) / name
        if source.is_file() and not (folder / name).exists():
            shutil.copy(source, folder / name)
