"""Tensors of a file that `torch.save` wrote (`adapter_model.bin`), read without unpickling anything.

Such a file is a zip: the numbers lie in it as they are, and a pickle says which tensors they form. A pickle is a
program for a small stack machine that may call any function by its name. Here another machine reads it: it knows
numbers, strings, containers and the few names by which tensors are built, looks nothing up, and calls nothing that a
file names.
"""

from __future__ import annotations

import io
import json
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltatune.errors import FormatError, LimitError, UnsafeError
from deltatune.storage.facts import read_facts_of
from deltatune.storage.tensors import MAX_TENSORS, check_digest, digest, refuse_pointer

MAX_PROGRAM = 50_000_000  # bytes of the pickle, which holds names and shapes, not numbers
FACTS = "deltatune.json"  # our entry beside torch's, which torch passes over

_STORAGES = {"Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Double": torch.float64}
_STORAGES |= {"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8}
_DTYPES = {f"torch {name}Storage": dtype for name, dtype in {**_STORAGES, "Bool": torch.bool}.items()}
_TENSOR, _PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_DICT = "collections OrderedDict"
_NAMES = {_TENSOR, _PARAMETER, _DICT, *_DTYPES}


def read_zipped(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors (private copies), and the facts that we put there, None when another tool wrote the file.

    Raises:
        UnsafeError: It asks for anything but tensors, or is a bare pickle.
        FormatError: It is damaged.
    """
    if not path.is_file():
        raise FormatError(f"{path} is not a file", path=str(path))
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            refuse_pointer(path, file.read(40))
        raise _unsafe(path, "no zip as torch writes it since 1.6")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            _check_entries(path, entries)
            root = next((name for name in entries if name.endswith("data.pkl")), "").removesuffix("data.pkl")
            machine = _Machine(path, lambda key: archive.read(f"{root}data/{key}"))
            if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
                raise FormatError(f"{path}: big-endian numbers, which are not read here", path=str(path))
            found = machine.run(archive.read(f"{root}data.pkl"))
            facts = read_facts_of(path, archive.read(root + FACTS).decode()) if root + FACTS in entries else None
    except (zipfile.BadZipFile, KeyError, IndexError, TypeError, ValueError, RuntimeError, OSError, EOFError) as error:
        if isinstance(error, (FormatError, UnsafeError, LimitError)):
            raise
        raise FormatError(
            f"{path} ({path.stat().st_size} bytes) is not a whole file of torch.save: {error}; fetch or save it again",
            path=str(path),
        ) from error
    tensors = _tensors(path, found)
    check_digest(path, tensors, facts)
    return tensors, facts


def to_zipped(tensors: dict[str, Tensor], facts: dict[str, Any]) -> bytes:
    """What `torch.save` writes, and our facts beside it."""
    buffer = io.BytesIO()
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    torch.save(plain, buffer)
    facts = {**facts, "sha256": digest(plain)}
    with zipfile.ZipFile(buffer, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(zipfile.ZipInfo(f"{root}/{FACTS}"), json.dumps(facts, sort_keys=True))
    return buffer.getvalue()


def _unsafe(path: Path, why: str) -> UnsafeError:
    return UnsafeError(
        f"{path} is {why}; what a pickle does beyond naming tensors is never run. If you trust the file, load it with "
        "torch yourself and save the tensors as adapter_model.safetensors (safetensors.torch.save_file)",
        path=str(path),
    )


def _check_entries(path: Path, entries: dict[str, zipfile.ZipInfo]) -> None:
    if len(entries) > MAX_TENSORS + 10:
        raise LimitError(f"{path}: {len(entries)} entries, up to {MAX_TENSORS} tensors are read", path=str(path))
    packed = [name for name, info in entries.items() if info.compress_type != zipfile.ZIP_STORED]
    if packed:  # torch never compresses; a few bytes could unfold to any size
        raise _unsafe(path, f"a zip with a compressed entry {packed[0]!r}, which torch does not write")
    program = next((info for name, info in entries.items() if name.endswith("data.pkl")), None)
    if program is None:
        raise _unsafe(path, "a zip without data.pkl, not one of torch.save")
    if program.file_size > MAX_PROGRAM:
        raise LimitError(f"{path}: names and shapes take {program.file_size} bytes", path=str(path))


def _tensors(path: Path, found: Any) -> dict[str, Tensor]:
    if not isinstance(found, dict):
        raise FormatError(f"{path} holds a {type(found).__name__}, expected names with tensors", path=str(path))
    wrong = [key for key, value in found.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if wrong:
        raise FormatError(
            f"{path}: {wrong[0]!r} is a {type(found[wrong[0]]).__name__}, expected a tensor under a name",
            path=str(path),
            key=str(wrong[0]),
        )
    return found


@dataclass(frozen=True)
class _Name:
    """A function or class that the file names; nothing but the name."""

    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    length: int


@dataclass
class _Machine:
    """Runs the program. `numbers` gives the bytes of a storage.

    Everything on the stack is a number, a string, a container of such, a `_Name`, a `_Storage` or a tensor.
    """

    path: Path
    numbers: Callable[[str], bytes]
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    storages: dict[_Storage, Tensor] = field(default_factory=dict)

    def run(self, program: bytes) -> Any:
        for operation, argument, _ in pickletools.genops(program):
            if operation.name == "STOP":
                break
            step = _STEPS.get(operation.name)
            if step is None:
                raise _unsafe(self.path, f"a pickle with the operation {operation.name}, which no tensor needs")
            step(self, argument)
        return self.stack.pop()

    def put(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def last(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise IndexError("an operation without operands")
        found = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return found

    def remember(self, place: Any) -> None:
        self.memo[len(self.memo) if place is None else place] = self.stack[-1]

    def name(self, name: str) -> None:
        if name not in _NAMES:
            raise _unsafe(self.path, f"a pickle that asks for {name.replace(' ', '.')!r}")
        self.put(_Name(name))

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise TypeError("an entry for something that is no dict")
        target.update(zip(items[::2], items[1::2]))

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError("an element for something that is no list")
        self.stack[-1].extend(items)

    def state(self) -> None:
        """Attributes of the object below: an OrderedDict has some (versions of modules), which are passed over."""
        self.last(1)
        if not isinstance(self.stack[-1], dict):
            raise _unsafe(self.path, f"a pickle that sets attributes of a {type(self.stack[-1]).__name__}")

    def storage(self) -> None:
        kind, dtype, key, _, length = self.stack.pop()
        if kind != "storage" or not isinstance(dtype, _Name) or dtype.name not in _DTYPES or not key.isalnum():
            raise ValueError("a storage of no known kind")
        self.put(_Storage(_DTYPES[dtype.name], key, length))

    def call(self) -> None:
        called, arguments = self.last(2)
        name = called.name if isinstance(called, _Name) else None
        if name == _DICT:
            self.put(dict(*arguments))
        elif name == _TENSOR:
            self.put(self.tensor(*arguments[:4]))
        elif name == _PARAMETER and isinstance(arguments[0], Tensor):
            self.put(arguments[0])
        else:
            raise _unsafe(self.path, f"a pickle that calls {name or type(called).__name__!r}")

    def tensor(self, storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        flat = self.flat(storage)
        numbers = (offset, *size, *stride)
        count = 1
        for side in size:
            count *= side
        last = offset + sum((side - 1) * step for side, step in zip(size, stride))
        if any(type(n) is not int or n < 0 for n in numbers) or len(size) != len(stride):
            raise ValueError(f"a tensor of shape {size} and strides {stride}")
        if count > len(flat) or (count and last >= len(flat)):
            raise ValueError(f"a tensor of shape {size} in {len(flat)} numbers")
        return flat.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)

    def flat(self, storage: Any) -> Tensor:
        if not isinstance(storage, _Storage):
            raise TypeError("a tensor without a storage")
        if storage not in self.storages:
            content = bytearray(self.numbers(storage.key))
            if len(content) != storage.length * storage.dtype.itemsize:
                raise ValueError(f"a storage of {len(content)} bytes for {storage.length} numbers")
            whole = torch.frombuffer(content, dtype=storage.dtype) if content else torch.empty(0, dtype=storage.dtype)
            self.storages[storage] = whole
        return self.storages[storage]


_STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda m, a: None),
    **dict.fromkeys(
        ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _Machine.put
    ),
    "NONE": lambda m, a: m.put(None),
    "NEWTRUE": lambda m, a: m.put(True),
    "NEWFALSE": lambda m, a: m.put(False),
    "EMPTY_DICT": lambda m, a: m.put({}),
    "EMPTY_LIST": lambda m, a: m.put([]),
    "EMPTY_TUPLE": lambda m, a: m.put(()),
    "MARK": lambda m, a: m.marks.append(len(m.stack)),
    "TUPLE": lambda m, a: m.put(tuple(m.since_mark())),
    "TUPLE1": lambda m, a: m.put(m.last(1)),
    "TUPLE2": lambda m, a: m.put(m.last(2)),
    "TUPLE3": lambda m, a: m.put(m.last(3)),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, a: m.put(m.memo[a])),
    "SETITEM": lambda m, a: m.set_items(list(m.last(2))),
    "SETITEMS": lambda m, a: m.set_items(m.since_mark()),
    "APPEND": lambda m, a: m.extend(list(m.last(1))),
    "APPENDS": lambda m, a: m.extend(m.since_mark()),
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": lambda m, a: m.name(" ".join(m.last(2))),
    "BINPERSID": lambda m, a: m.storage(),
    "REDUCE": lambda m, a: m.call(),
    "BUILD": lambda m, a: m.state(),
}
