"""The random states of a process, captured as plain values and put back exactly."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # CUDA's generators too


def seed_process(seed: int, process: int, step: int) -> None:
    """Seed what is drawn while training: each process drops out other things, and none the same again after `step`."""
    seed_all((seed + 1_000_003 * process + 7_368_787 * step) % 2**32)


def capture() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, plain values): torch's states are bytes, Python's and numpy's are numbers that JSON holds exactly."""
    tensors = {"torch": torch.get_rng_state()}
    for index in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        tensors[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    plain = {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
    }
    return tensors, plain


def restore(tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["torch"])
    for name, state in tensors.items():
        if name.startswith("cuda.") and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name[5:]))
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


@contextmanager
def untouched() -> Iterator[None]:
    """Whatever happens inside leaves the random states as they were: evaluation cannot change what is learnt."""
    state = capture()
    try:
        yield
    finally:
        restore(*state)
