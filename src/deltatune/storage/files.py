"""Writing several files of one folder so that a crash leaves the old ones or the new ones."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from deltatune.errors import SaveError


def write_files(folder: Path, files: Mapping[str, bytes], stale: Iterable[str] = ()) -> None:
    """Write all files of `files` into `folder`: to temporary names, to the disk, and then in place, in order.

    The last file is the commit point: readers that find it whole find the others whole too. Files that it makes stale
    go after it.

    Raises:
        SaveError: Nothing was replaced.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise SaveError(f"{folder} is a file, expected a folder to save into", path=str(folder))
    made = _missing(folder)
    temporary: dict[Path, Path] = {}
    before: dict[Path, bytes | None] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            target = (folder / name).resolve()  # through a link, to the file the user really has there
            temporary[target] = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
            _write(temporary[target], content, _mode(target))
        for target, source in temporary.items():
            if target != list(temporary)[-1]:  # should a later one fail; the last is the large one
                before[target] = target.read_bytes() if target.exists() else None
            os.replace(source, target)
    except OSError as error:
        _put_back(before)
        for source in temporary.values():
            source.unlink(missing_ok=True)
        for path in made:
            path.rmdir() if path.is_dir() and not any(path.iterdir()) else None
        raise SaveError(
            f"{error.filename or folder}: cannot be written: {error.strerror or error}; what was there is untouched",
            path=str(folder),
            found=error.errno,
        ) from error
    for name in stale:
        with suppress(OSError):  # should it stay, the last file says that it is stale
            (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # all is in place; some file systems cannot sync a folder
        _sync(folder)


def _put_back(before: Mapping[Path, bytes | None]) -> None:
    """Undo what was replaced; a reader of ours does without, because the last file is the commit point."""
    for target, content in before.items():
        with suppress(OSError):
            if content is None:
                target.unlink(missing_ok=True)
            elif target.read_bytes() != content:
                spare = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
                _write(spare, content, _mode(target))
                os.replace(spare, target)


def _missing(folder: Path) -> list[Path]:
    """The folders that saving would create, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _mode(target: Path) -> int:
    if target.exists():
        return target.stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _write(path: Path, content: bytes, mode: int) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(mode)


def _sync(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
