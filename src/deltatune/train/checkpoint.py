"""Checkpoints: folders `checkpoint-<step>` that are whole or not there. Safetensors and JSON, never a pickle.

A folder is written under a temporary name beside its place: files, flush to disk, then `manifest.json` with the size
and sha256 of every file, then one rename. A folder without a manifest, or that does not agree with it, is not whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from deltatune.errors import ResumeError, SaveError

MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS = ("trainable", "optimizer", "random")
SCHEDULE = "schedule"  # a fourth group, where the method follows a schedule
FORMAT = 1
NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: tensors by group, and everything else as plain JSON values."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def folder_of(output: Path, step: int) -> Path:
    return output / f"checkpoint-{step}"


def write(output: Path, step: int, checkpoint: Checkpoint, extra: Callable[[Path], None] | None = None) -> Path:
    """Write one checkpoint; `extra` may put further files into the folder (the adapter, to be used as it is).

    Raises:
        SaveError: Nothing changed; earlier checkpoints are whole.
    """
    place = folder_of(output, step)
    temporary = output / f".{place.name}.{secrets.token_hex(4)}.tmp"
    try:
        temporary.mkdir(parents=True)
        for group in (*TENSORS, *([SCHEDULE] if checkpoint.tensors.get(SCHEDULE) else [])):
            tensors = {name: value.detach().cpu().contiguous() for name, value in checkpoint.tensors[group].items()}
            (temporary / f"{group}.safetensors").write_bytes(save(tensors))
        (temporary / STATE).write_text(json.dumps(checkpoint.state, indent=1, allow_nan=False), encoding="utf-8")
        if extra is not None:
            extra(temporary)
        _seal(temporary, step)
        _replace(temporary, place)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(
            f"{place}: the checkpoint cannot be written ({error.strerror or error}); earlier ones are untouched, "
            "make room and resume",
            path=str(place),
            found=error.errno,
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return place


def read(folder: Path) -> Checkpoint:
    """Read a whole checkpoint.

    Raises:
        ResumeError: A file is missing, cut short or changed.
    """
    fault = problem(folder)
    if fault:
        raise ResumeError(f"{folder} is not a whole checkpoint: {fault}; use an earlier one", path=str(folder))
    tensors: dict[str, dict[str, Tensor]] = {SCHEDULE: {}}
    for group in (*TENSORS, *([SCHEDULE] if (folder / f"{SCHEDULE}.safetensors").is_file() else [])):
        try:
            tensors[group] = load((folder / f"{group}.safetensors").read_bytes())
        except (SafetensorError, OSError, ValueError) as error:
            raise ResumeError(f"{folder}/{group}.safetensors cannot be read: {error}", path=str(folder)) from error
    return Checkpoint(tensors, json.loads((folder / STATE).read_text(encoding="utf-8")))


def problem(folder: Path) -> str | None:
    """Why a folder is not a whole checkpoint; None when it is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, version = manifest["files"], manifest["format"]
        names = [f"{group}.safetensors" for group in TENSORS] + [STATE]
        absent = [name for name in names if name not in files]
        if version != FORMAT or absent:
            return (
                f"{MANIFEST} is of format {version!r}" if version != FORMAT else f"{MANIFEST} does not list {absent[0]}"
            )
        for name, facts in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, {facts['bytes']} were written"
            if _sha256(path) != facts["sha256"]:
                return f"{name} does not agree with its hash"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def listed(output: Path) -> list[tuple[int, Path]]:
    """All checkpoint folders, whole or not, oldest first; ordered by their step, not by clocks."""
    if not output.is_dir():
        return []
    found = [(NAME.fullmatch(path.name), path) for path in output.iterdir()]
    # folders of the same name that other programs left are none of ours: never read, never removed
    ours = [(m, path) for m, path in found if m and ((path / STATE).is_file() or (path / MANIFEST).is_file())]
    return sorted((int(match[1]), path) for match, path in ours)


def newest(output: Path, notice: Callable[[str], None] = lambda text: None) -> Path | None:
    """The newest whole checkpoint; what is passed over is told. None when there is no checkpoint folder at all.

    Raises:
        ResumeError: There are checkpoints, and none is whole.
    """
    torn = []
    for _, path in reversed(listed(output)):
        fault = problem(path)
        if fault is None:
            return path
        torn.append(f"{path.name}: {fault}")
        notice(f"skipping {path}: {fault}")
    if torn:
        raise ResumeError(
            f"no whole checkpoint in {output} ({'; '.join(torn)}); start anew with overwrite_output_dir: true",
            path=str(output),
            found=torn,
        )
    return None


def rotate(output: Path, keep: int | None, best: int | None) -> list[Path]:
    """Remove the oldest beyond `keep`; the last and the best one stay. Also what a crash left half-written."""
    for path in output.glob(".checkpoint-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    if keep is None:
        return []
    steps = [step for step, _ in listed(output)]
    kept = set(steps[-1:]) | ({best} if best in steps else set())
    for step in reversed(steps):  # the newest fill up what the limit allows
        if len(kept) < keep:
            kept.add(step)
    removed = [path for step, path in listed(output) if step not in kept]
    for path in removed:
        _remove(path)
    return removed


def remove_all(output: Path) -> None:
    """Every checkpoint of ours, whole or not."""
    for _, path in listed(output):
        _remove(path)
    rotate(output, None, None)


def _remove(path: Path) -> None:
    # the name goes first, so that a crash in the middle leaves no half folder under a checkpoint's name
    gone = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with suppress(OSError):  # what cannot be removed stays, and is tried again after the next checkpoint
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _seal(folder: Path, step: int) -> None:
    """Everything to the disk, then the manifest, then the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths
    }
    for path in paths:
        _sync(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1), encoding="utf-8")
    _sync(manifest)
    for path in sorted(path for path in folder.rglob("*") if path.is_dir()):
        _sync(path)
    _sync(folder)


def _replace(temporary: Path, place: Path) -> None:
    if place.exists():  # the same step once more, after a resume: the torn or equal one makes room
        old = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
        os.rename(place, old)
        try:
            os.rename(temporary, place)
        except OSError:
            os.rename(old, place)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(temporary, place)
    with suppress(OSError):  # it is in place; an error would say that it is not
        _sync(place.parent)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
