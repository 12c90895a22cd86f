"""Where an adapter's files are: in a local folder, or in a repository of the hub.

What looks like a path is never sent to the network, whether or not it is there.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from deltatune import checks
from deltatune.errors import FormatError, UnsafeError

_EXPECTED = "an adapter's folder, or a repository of the hub as 'owner/name'"
_REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


class Place(Protocol):
    """Somewhere with files.

    Attributes:
        local: Asking for a file that is not there costs nothing.
    """

    local: bool

    def find(self, filename: str) -> Path | None: ...  # None: it has no such file
    def missing(self, filename: str) -> FormatError: ...  # what to say then


def place(name_or_path: str | Path, subfolder: str | None = None, **hub: Any) -> Place:
    """A local folder, or (owner/name that is none) a repository of the hub; asked for files, not before.

    Args:
        hub: How to fetch from the hub (`deltatune.storage.hub.OPTIONS`), unused for a folder.

    Raises:
        FormatError: A path where no folder is.
        ConfigError: No path at all.
        UnsafeError: The subfolder leads out of the folder.
    """
    checks.instance("model_id", name_or_path, (str, os.PathLike), _EXPECTED)
    if subfolder is not None:
        checks.instance("subfolder", subfolder, (str, os.PathLike), "the name of a folder in it")
    if name_or_path == "":
        raise FormatError(
            "model_id='' names no folder; '.' is the one this program runs in",
            field="model_id",
            path="",
            expected=_EXPECTED,
        )
    root = Path(name_or_path)
    if os.path.isdir(root):  # whatever the name is, a question and no error
        return Folder(root, subfolder)
    if os.path.exists(root):
        raise FormatError(
            f"{name_or_path} is a {'file' if root.is_file() else 'device'}; give the folder that holds the adapter",
            path=str(name_or_path),
        )
    if not is_repository(name_or_path):
        raise FormatError(
            f"{name_or_path} does not exist; expected {_EXPECTED}",
            path=str(name_or_path),
            expected=_EXPECTED,
        )
    from deltatune.storage.hub import Repository

    _check_inside(str(name_or_path), subfolder)
    return Repository(str(name_or_path), subfolder, hub)


def locate(name_or_path: str | Path, filename: str, subfolder: str | None = None, **hub: Any) -> Path:
    """The local path of a file of a place.

    Raises:
        FormatError: There is no such file.
    """
    where = place(name_or_path, subfolder, **hub)
    found = where.find(filename)
    if found is None:
        raise where.missing(filename)
    return found


def is_repository(name: str | Path) -> bool:
    """Whether it can be the name of a repository, and cannot be meant as a path."""
    return (
        isinstance(name, str)
        and len(name) <= 96
        and _REPOSITORY.fullmatch(name) is not None
        and ".." not in name
        and "--" not in name
        and not any(part.endswith((".", "-", ".git")) for part in name.split("/"))
    )


@dataclass
class Folder:
    """A local folder, or a subfolder of it."""

    root: Path
    subfolder: str | None = None
    path: Path = field(init=False)
    local: bool = True

    def __post_init__(self) -> None:
        self.path = self.root / self.subfolder if self.subfolder else self.root
        if self.subfolder and not self.path.resolve().is_relative_to(self.root.resolve()):
            raise _outside(self.subfolder, str(self.root))

    def find(self, filename: str) -> Path | None:
        file = self.path / filename
        if not file.is_file():
            if file.exists():  # a pipe would be waited for
                raise FormatError(f"{file} is no file that can be read", path=str(file))
            return None
        return file

    def missing(self, filename: str) -> FormatError:
        return FormatError(
            f"{self.path} has no {filename}; it is not an adapter folder", path=str(self.path / filename)
        )


def _check_inside(name: str, subfolder: str | None) -> None:
    inner = PurePosixPath(subfolder or "")
    if inner.is_absolute() or ".." in inner.parts or "\\" in str(inner):
        raise _outside(str(subfolder), name)


def _outside(subfolder: str, root: str) -> UnsafeError:
    return UnsafeError(f"subfolder {subfolder!r} leads out of {root}", field="subfolder", path=root)
