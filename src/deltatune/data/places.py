"""Files by what a user writes: a file, a folder, a pattern (`data/*.jsonl`), each with `#500` for 500 of its rows."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from deltatune.data.hub import is_saved
from deltatune.data.parse import KINDS, kind_of
from deltatune.errors import DataError
from deltatune.suggest import did_you_mean


@dataclass(frozen=True)
class Place:
    """A file, or a folder that the datasets library saved, and how many of its rows are wanted (None: all)."""

    path: Path
    count: int | None = None


def places(sources: Iterable[str]) -> list[Place]:
    """Every file that the sources name, in their order; those of a folder or pattern by name."""
    found: list[Place] = []
    for source in sources:
        text, count = _counted(source)
        paths = _paths(text)
        if count is not None and len(paths) > 1:
            raise DataError(
                f"data {source!r}: #{count} stands behind {len(paths)} files; put it behind one of them",
                path=source,
                found=[str(path) for path in paths[:5]],
                expected="one file",
            )
        found += [Place(path, count) for path in paths]
    return found


def _counted(source: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(.+)#(\d+)", source)
    if match is None or Path(source).exists():
        return source, None
    if int(match[2]) < 1:
        raise DataError(f"data {source!r} asks for no row; give a number of 1 or more behind #", path=source, found=0)
    return match[1], int(match[2])


def _paths(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        if is_saved(path):
            return [path]
        found = sorted(each for each in path.rglob("*") if each.is_file() and kind_of(each) and not _hidden(each, path))
        if not found:
            raise DataError(
                f"data folder {source} holds no data file; expected files that end in {', '.join(KINDS)}",
                path=source,
                expected=list(KINDS),
            )
        return found
    if not path.exists() and glob.has_magic(source):
        found = sorted(Path(each) for each in glob.glob(str(path), recursive=True) if Path(each).is_file())
        if not found:
            raise DataError(f"pattern {source!r} matches no data file", path=source, found=0, expected="a file or more")
        return found
    if not path.exists():
        beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(
            f"data file {source} does not exist{did_you_mean(path.name, beside)}",
            path=source,
            expected="an existing file",
        )
    return [path]


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)
