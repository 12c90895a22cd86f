"""One file of tensors: safetensors with our facts in its header; read whole into private memory, checked, no pickle."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as serialise
from torch import Tensor

from deltatune.errors import FormatError, IntegrityError, LimitError
from deltatune.memory import told
from deltatune.storage.facts import read_facts_of

WEIGHTS_NAME = "adapter_model.safetensors"
MARKER = "deltatune"  # header key of the facts we add; other readers pass over it
MAX_HEADER = 50_000_000
MAX_TENSORS = 100_000
MAX_BRACKETS = 4 * MAX_TENSORS  # a tensor has three, and a config is there too


def to_bytes(tensors: dict[str, Tensor], facts: dict[str, Any]) -> bytes:
    """A safetensors file; `facts` and a digest of the values go into its header."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {**facts, "sha256": digest(plain)}
    return _in_order(serialise(plain, {"format": "pt", MARKER: json.dumps(header, sort_keys=True)}))


def _in_order(content: bytes) -> bytes:
    """The same file with sorted metadata: the writer's order is random, and equal adapters should be equal files."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the values stay aligned
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors, whose memory nobody else has, and the facts of the header, None when another tool wrote the file.

    Raises:
        FormatError: Not a safetensors file, or a truncated one.
        IntegrityError: The values are not those that were written.
    """
    if not path.is_file():
        raise FormatError(f"{path} is not a file", path=str(path))
    header = _read_header(path)  # before the rest, which may be of any size
    try:
        with told(f"reading {path}", "the model is as it was"):
            content = path.read_bytes()
            tensors = parse(content)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}", path=str(path)) from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise FormatError(
            f"{path} ({len(content)} bytes) is not a whole safetensors file: {error}; fetch or save it again",
            path=str(path),
            found=len(content),
        ) from error
    facts = _facts(path, header)
    check_digest(path, tensors, facts)
    return tensors, facts


def read_facts(path: Path) -> dict[str, Any] | None:
    """The facts of a file's header alone."""
    return _facts(path, _read_header(path))


def _read_header(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(40)
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
            content = start + file.read(min(length, MAX_HEADER))
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}", path=str(path)) from error
    return _header(path, content, size)


def _header(path: Path, content: bytes, size: int) -> dict[str, Any]:
    """The table of tensors, out of the beginning of a file of `size` bytes."""
    refuse_pointer(path, content)
    if size < 8:
        raise FormatError(f"{path}: {size} bytes are no safetensors file", path=str(path), found=size)
    (length,) = struct.unpack("<Q", content[:8])
    if length > size - 8:
        raise FormatError(
            f"{path} ({size} bytes) is truncated or no safetensors file: its header claims {length} bytes",
            path=str(path),
            found=size,
            expected=length,
        )
    table = content[8 : 8 + length]
    brackets = table.count(b"{") + table.count(b"[")
    if length > MAX_HEADER or brackets > MAX_BRACKETS:  # before it is parsed, which takes many times its size
        raise LimitError(
            f"{path}: a header of {length} bytes with {brackets} lists and tables, up to {MAX_HEADER} and "
            f"{MAX_BRACKETS} are read, which is {MAX_TENSORS} tensors",
            path=str(path),
            found=length,
            expected=MAX_HEADER,
        )
    try:
        header = json.loads(table)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: its header is not readable ({error})", path=str(path)) from None
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise LimitError(
            f"{path}: more than {MAX_TENSORS} tensors, or no table of tensors", path=str(path), expected=MAX_TENSORS
        )
    _check_size(path, header, size - 8 - length)
    return header


def _check_size(path: Path, header: dict[str, Any], size: int) -> None:
    """Compare the bytes that follow a table with those that it describes, before they are read."""
    try:
        entries = (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        described = max(entries, default=0)
    except (TypeError, KeyError, IndexError, AttributeError):
        return  # safetensors says what is wrong with it
    if described != size:
        raise FormatError(
            f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file: its header describes {described} "
            f"bytes of values, {size} are there; fetch or save it again",
            path=str(path),
            found=size,
            expected=described,
        )


def _facts(path: Path, header: dict[str, Any]) -> dict[str, Any] | None:
    metadata = header.get("__metadata__") or {}
    text = metadata.get(MARKER) if isinstance(metadata, dict) else None
    return read_facts_of(path, text) if isinstance(text, str) else None


def digest(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b"")  # type: ignore[arg-type]
    return total.hexdigest()


def check_digest(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any] | None) -> None:
    if facts is not None and facts.get("sha256") not in (None, digest(tensors)):
        raise IntegrityError(
            f"{path}: the values do not agree with their digest; the file was damaged after it was written",
            path=str(path),
            found=digest(tensors),
            expected=facts["sha256"],
        )


def refuse_pointer(path: Path, content: bytes) -> None:
    if content.startswith(b"version https://git-lfs"):
        raise FormatError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull`", path=str(path))
