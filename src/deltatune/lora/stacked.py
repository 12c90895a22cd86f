"""Plain LoRA of rank 2r that says the same: s (B A - B0 A0) = s [B, -B0] [A; A0].

PEFT restores the start of some adapters when it loads them (PiSSA on linear layers: it decomposes the base again).
Where it cannot, a file holds the stacked factors and its config says what they are, so that every program reads it
right. The options to go on training with stand in the file's header, where only we look (`own`).
"""

from __future__ import annotations

from collections.abc import Collection
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from deltatune.notice import warn

NAMES = {False: ("lora_A.weight", "lora_B.weight"), True: ("lora_embedding_A", "lora_embedding_B")}  # True: embeddings
START_A, START_B = "lora_start_A", "lora_start_B"
_SAID = ("init_lora_weights", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "corda_config", "lora_ga_config")

Values = dict[str, Any]
Tensors = dict[str, Tensor]


def for_peers(
    config: Any, values: Values, tensors: Tensors, kept: Collection[str], plain: bool
) -> tuple[Values, Tensors, Values]:
    """What a file says of a LoRA adapter: its config, its tensors, and what only we read.

    Args:
        values: The config as it is.
        tensors: By key, with those that may be derived again.
        kept: The keys that cannot be.
        plain: Write LoRA without a start in any case.
    """
    starts = {key for key in tensors if key.endswith((START_A, START_B))}
    bare = {key: tensor for key, tensor in tensors.items() if key not in starts}
    if plain and not starts:
        warn("save_pretrained: the base gives way to nothing in this adapter, so it is written as it is")
    # the user may say init_lora_weights=True of an untrained adapter, to save where it begins
    if starts and (plain or (starts & set(kept) and config.init_lora_weights is not True)):
        return doubled(values), stacked(tensors), {} if plain else {name: values[name] for name in _SAID}
    return values, bare, {}


def doubled(values: Values) -> Values:
    """The config of the stacked factors: twice the rank, the same scaling on every layer."""
    factor = sqrt(2) if values["use_rslora"] else 2
    return {
        **values,
        "init_lora_weights": True,
        "corda_config": None,
        "lora_ga_config": None,
        "r": 2 * values["r"],
        "lora_alpha": factor * values["lora_alpha"],
        "rank_pattern": {name: 2 * r for name, r in values["rank_pattern"].items()},
        "alpha_pattern": {name: factor * alpha for name, alpha in values["alpha_pattern"].items()},
    }


def stacked(tensors: Tensors) -> Tensors:
    """[A; A0] and [B, -B0] of every layer; zeros stand for a start that a layer does not have."""
    found = {key: tensor for key, tensor in tensors.items() if not key.endswith((START_A, START_B))}
    for name_A, name_B in NAMES.values():
        for key_A in [key for key in found if key.endswith(f".{name_A}")]:
            root = key_A.removesuffix(name_A)
            A, B = found[key_A], found[root + name_B]
            A0, B0 = tensors.get(root + START_A, torch.zeros_like(A)), tensors.get(root + START_B, torch.zeros_like(B))
            found[key_A], found[root + name_B] = beside(A, A0), beside(B, -B0, 1)
    return found


def beside(left: Tensor, right: Tensor, axis: int = 0) -> Tensor:
    return torch.cat([left, right.reshape(left.shape).to(left)], axis)


def unstacked(tensors: Tensors, r: int, names: tuple[str, str]) -> Tensors:
    """The factors of one layer and their start, out of stacked ones."""
    A, B = (tensors.get(name) for name in names)
    if A is None or B is None or START_A in tensors or len(A) != 2 * r or B.shape[1] != 2 * r:
        return tensors
    start = {START_A: A[r:].flatten(1), START_B: -B[:, r:].flatten(1)}
    return {**tensors, names[0]: A[:r], names[1]: B[:, :r], **start}


def subtracted(trained: Tensors, start: Tensors) -> Tensors:
    """Stacked factors out of those of two adapters, each by key: `subtract_mutated_init` of PEFT."""
    found = {}
    for name_A, name_B in NAMES.values():
        for key in trained:
            if key.endswith(f".{name_A}"):
                found[key] = beside(trained[key], start[key])
            elif key.endswith(f".{name_B}"):
                found[key] = beside(trained[key], -start[key], 1)
    return found
