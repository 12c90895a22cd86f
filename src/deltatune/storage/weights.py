"""The tensors of an adapter, in whichever of the two formats a place has them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltatune.errors import ConfigError, PeftError, UnsafeError
from deltatune.storage.keys import mapped
from deltatune.storage.locate import Place, place
from deltatune.storage.tensors import WEIGHTS_NAME, read_facts, read_file
from deltatune.storage.zipped import read_zipped

ZIPPED_NAME = "adapter_model.bin"  # what PEFT wrote before 0.7
FORMATS = {WEIGHTS_NAME: read_file, ZIPPED_NAME: read_zipped}
REPLACES = "replaces"  # fact: the files of the other format that were there when this one was written


def read_weights(where: Place) -> tuple[Path, dict[str, Tensor], dict[str, Any] | None]:
    """File, tensors and our facts; a repository is asked for the older format only where it lacks the newer one.

    Raises:
        FormatError: There are none.
        UnsafeError: A folder has both, and nothing says which is the adapter.
    """
    newer = where.find(WEIGHTS_NAME)
    older = where.find(ZIPPED_NAME) if newer is None or where.local else None
    found = newer or older
    if found is None:
        raise where.missing(WEIGHTS_NAME)
    if newer is None or older is None:
        return (found, *FORMATS[WEIGHTS_NAME if newer else ZIPPED_NAME](found))
    for mine, other in ((newer, older), (older, newer)):
        facts = facts_of(mine)
        if facts and (facts.get(REPLACES) or {}).get(other.name) == file_digest(other):
            return (mine, *FORMATS[mine.name](mine))
    raise UnsafeError(
        f"{newer.parent} holds {WEIGHTS_NAME} and {ZIPPED_NAME}, and nothing says which of them is the adapter; "
        "remove the one that is not",
        path=str(older),
    )


def facts_of(file: Path) -> dict[str, Any] | None:
    """Our facts in a file of either format; None where another tool wrote it, or none can be read."""
    try:
        return read_facts(file) if file.name == WEIGHTS_NAME else read_zipped(file)[1]
    except (PeftError, OSError):
        return None


def file_digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def load_peft_weights(
    model_id: str | Path,
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> dict[str, Tensor]:
    """The tensors of an adapter's folder or repository under the keys of its file.

    Args:
        device: Where to put them; None: the first accelerator, or the CPU.
        key_mapping: Regular expression -> replacement, for keys without `base_model.model.`; the first that is found.
        hub: `revision`, `token`, `cache_dir`, `local_files_only` and other arguments of `hf_hub_download`.

    Raises:
        FormatError: There is no such file, or it is damaged.
        UnsafeError: A pickle that asks for more than tensors.
    """
    _, tensors, _ = read_weights(place(model_id, subfolder, **hub))
    target = checked_device(device)
    return {key: tensor.to(target) for key, tensor in mapped(tensors, key_mapping).items()}


def checked_device(device: str | torch.device | None) -> torch.device:
    """The device; of None the first accelerator, or the CPU.

    Raises:
        ConfigError: It is none, is not here, or holds no numbers ("meta").
    """
    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
        reason = "holds no numbers" if found.type == "meta" else None
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without it
        found, reason = torch.device("cpu"), f"is no device that is here ({str(error).splitlines()[0]})"
    if reason is not None:
        raise ConfigError(
            f"torch_device={str(device)!r} {reason}; use 'cpu', or an accelerator such as 'cuda:0'",
            field="torch_device",
            found=str(device),
        )
    return found
