"""Saving as plain LoRA: does the folder that is said to be the start hold it?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltatune.errors import ConfigError, MismatchError
from deltatune.lora.stacked import NAMES, START_A, START_B
from deltatune.storage.locate import place
from deltatune.storage.weights import read_weights

if TYPE_CHECKING:
    from deltatune.model import PeftModel


def check_start(model: PeftModel, name: str, folder: str | Path) -> None:
    """Compare a folder, saved before training, with the frozen start of an adapter, by their products.

    Raises:
        ConfigError: It is no LoRA adapter.
        MismatchError: The folder holds another start.
    """
    if model.peft_config[name].peft_type != "LORA":
        kind = getattr(model.peft_config[name].peft_type, "value", model.peft_config[name].peft_type)
        raise ConfigError(
            f"save_pretrained: path_initial_model_for_weight_conversion is for LoRA, and adapter {name!r} is {kind}; "
            "name others in selected_adapters",
            field="path_initial_model_for_weight_conversion",
            found=name,
        )
    _, saved, _ = read_weights(place(folder))
    tensors = model.adapter_tensors(name, given=None)
    for root in (key.removesuffix(START_A) for key in tensors if key.endswith(START_A)):
        start = _product(tensors[root + START_A], tensors[root + START_B])
        if not any(_alike(found, start) for found in _beginnings(saved, root)):
            raise MismatchError(
                f"{folder}: {root.removesuffix('.')} did not begin there in adapter {name!r}; name the folder that was "
                'saved before its training, or save with format="lora", which needs none',
                path=str(folder),
                key=root,
            )


def _beginnings(saved: dict[str, Tensor], root: str) -> Iterator[Tensor]:
    """B A of one layer, and, in case that both are stacked, of their second half."""
    for name_A, name_B in NAMES.values():
        if root + name_A in saved and root + name_B in saved:
            A, B = saved[root + name_A].flatten(1), saved[root + name_B].flatten(1)
            yield _product(A, B)
            yield -_product(A[len(A) // 2 :], B[:, B.shape[1] // 2 :])


def _product(A: Tensor, B: Tensor) -> Tensor:
    return B.float().cpu() @ A.float().cpu()


def _alike(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(
        found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()
    )
