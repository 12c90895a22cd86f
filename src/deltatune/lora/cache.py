"""Tensors by name in a file that PEFT's helpers read and write too: torch's format, opened without running code."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from deltatune.errors import FormatError, MismatchError
from deltatune.storage.files import write_files


def read_cache(file: str | None, keys: Iterable[str]) -> dict[str, Tensor] | None:
    """Those tensors of a file, None where there is no file.

    Raises:
        FormatError: It is no file of tensors.
        MismatchError: It was written for other layers.
    """
    path = None if file is None else Path(file)
    if path is None or not path.exists() or not path.stat().st_size:
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        tensors = {key: tensor for key, tensor in found.items() if isinstance(tensor, Tensor)}
    except (OSError, RuntimeError, ValueError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise FormatError(f"{path}: no file of tensors ({type(error).__name__}); remove it", path=str(path)) from error
    missing = sorted(key for key in keys if key not in tensors)
    if missing:
        raise MismatchError(
            f"{path} holds nothing for {missing[:3]}; it was made for other layers, name another file or remove it",
            path=str(path),
            expected=missing,
            found=sorted(tensors)[:5],
        )
    return {key: tensors[key] for key in keys}


def write_cache(file: str | None, tensors: dict[str, Tensor]) -> None:
    if file is None:
        return
    content = io.BytesIO()
    torch.save({key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}, content)
    write_files(Path(file).parent, {Path(file).name: content.getvalue()})
