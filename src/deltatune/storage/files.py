"""Writing several files of one folder so that a crash leaves the old ones or the new ones."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from deltatune.errors import SaveError
from deltatune.storage.lock import locked


def write_files(folder: Path, files: Mapping[str, bytes], stale: Iterable[str] = ()) -> None:
    """Write all files of `files` into `folder`; `write_folders` for one folder."""
    write_folders({Path(folder): files}, [Path(folder) / name for name in stale])


def write_folders(contents: Mapping[Path, Mapping[str, bytes]], stale: Iterable[Path] = ()) -> None:
    """Write files into folders: all to temporary names, to the disk, and then in place, in order.

    The last file of a folder is its commit point: readers that find it whole find the others whole too. Files that
    become stale go after all of that. Others who save to one of the folders wait (`deltatune.storage.lock`).

    Raises:
        SaveError: Nothing was replaced, in none of the folders.
    """
    folder = next(iter(contents))
    made: list[Path] = []
    try:
        for folder, files in contents.items():
            _refuse_others(folder, files)
        made = [path for folder in contents for path in _missing(folder)]
        for folder in contents:
            folder.mkdir(parents=True, exist_ok=True)
        with locked(contents):
            _replace(contents)
            _tidy(contents, stale)
    except SaveError:
        _unmake(made)
        raise
    except OSError as error:
        _unmake(made)
        raise _refusal(error, folder, contents, True) from error


def _refuse_others(folder: Path, files: Iterable[str]) -> None:
    """A file where the folder should be; a device or pipe where a file should be, which would wait or be replaced."""
    if folder.exists() and not folder.is_dir():
        raise SaveError(f"{folder} is a file, expected a folder to save into", path=str(folder))
    for target in (folder / name for name in files):
        if target.exists() and not (target.is_file() or target.is_dir()):  # a folder's own error is told later
            raise SaveError(
                f"{target} is a device or a pipe, expected a file; nothing was written",
                path=str(target),
                hint="remove it, or choose another folder",
            )


def _unmake(made: Iterable[Path]) -> None:
    for path in sorted(set(made), key=lambda path: len(path.parts), reverse=True):
        with suppress(OSError):  # not empty, or never made
            path.rmdir()


def _replace(contents: Mapping[Path, Mapping[str, bytes]]) -> None:
    """All files in place, or none."""
    temporary: dict[Path, Path] = {}
    before: dict[Path, bytes | None] = {}
    folder = next(iter(contents))
    try:
        for folder, files in contents.items():
            for name, content in files.items():
                # through a link, to the file the user really has there; one that leads to itself is replaced
                target = Path(os.path.realpath(folder / name))
                temporary[target] = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
                _write(temporary[target], content, _mode(target))
        for target, source in temporary.items():
            if target != list(temporary)[-1]:  # should a later one fail; after the last, a large one, none can
                before[target] = target.read_bytes() if target.exists() else None
            os.replace(source, target)
    except OSError as error:
        whole = _put_back(before)
        _remove(temporary.values())
        raise _refusal(error, folder, contents, whole) from error
    except BaseException:  # Ctrl-C: perhaps after the last of them is in place
        if list(temporary.values())[-1:] and list(temporary.values())[-1].exists():
            _put_back(before)
        _remove(temporary.values())
        raise


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):  # on a disk that fails for good it stays
            path.unlink(missing_ok=True)


def _tidy(contents: Iterable[Path], stale: Iterable[Path]) -> None:
    for path in stale:
        with suppress(OSError):  # should it stay, the last file says that it is stale
            path.unlink(missing_ok=True)
    for folder in contents:
        with suppress(OSError):  # all is in place; some file systems cannot sync a folder
            sync(folder)


def _refusal(error: OSError, folder: Path, contents: Mapping[Path, Mapping[str, bytes]], whole: bool) -> SaveError:
    left = "what was there is untouched" if whole else "the old files could not all be put back"
    return SaveError(
        f"{error.filename or folder}: cannot be written: {error.strerror or error}; {left}{_room(error, contents)}",
        path=str(folder),
        found=error.errno,
        hint="make room, or choose another folder",
    )


def _room(error: OSError, contents: Mapping[Path, Mapping[str, bytes]]) -> str:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ""
    return f" ({sum(len(content) for files in contents.values() for content in files.values())} bytes are needed)"


def _put_back(before: Mapping[Path, bytes | None]) -> bool:
    """Undo what was replaced, and whether that went well; a reader of ours does without, within one folder."""
    whole = True
    for target, content in before.items():
        try:
            if content is None:
                target.unlink(missing_ok=True)
            elif target.read_bytes() != content:
                spare = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
                _write(spare, content, _mode(target))
                os.replace(spare, target)
        except OSError:
            whole = False
    return whole


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


def sync(path: Path) -> None:
    """A file or a folder onto the disk."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
