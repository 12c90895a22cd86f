"""Checksums of tensors that config and base weight give again, so that files need not hold them.

A hash of the bits would fail on another processor, whose sums end in other last digits. So a tensor is drawn up as a
few projections onto fixed waves: last digits move them by as little, another seed or another vector by much. Integers
(places of entries) are the same everywhere or wrong, and are hashed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha256
from math import isclose, log2, sqrt
from typing import Any

import torch
from torch import Tensor

from deltatune.errors import MismatchError

TOLERANCE = 0.02  # of projections, whose size is about 1 / 2; rounding a weight to bfloat16 moves them by 0.001
_WAVES = ((2, 11), (3, 13), (5, 17), (7, 19))  # square roots have no common period


def checksums(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, list[float]]:
    """Name -> four projections and the logarithm of the norm; those of equal names in different layers are added up."""
    found: dict[str, list[float]] = {}
    for place, (name, tensor) in enumerate(tensors):
        numbers = _projections(tensor, place)
        found[name] = [old + new for old, new in zip(found.get(name, [0.0] * len(numbers)), numbers)]
    return {name: [round(number, 4) for number in numbers] for name, numbers in found.items()}


@torch.no_grad()
def _projections(tensor: Tensor, place: int) -> list[float]:
    if not tensor.is_floating_point():
        digest = sha256(f"{place} {tensor.flatten().tolist()}".encode()).digest()
        return [byte / 256 for byte in digest[: len(_WAVES) + 1]]
    matrix = tensor.detach().float().reshape(len(tensor) if tensor.ndim else 1, -1)
    norm = matrix.norm().item()
    if not norm > 0:
        return [0.0] * (len(_WAVES) + 1)
    rows, columns = (torch.arange(1, size + 1, device=matrix.device).float() for size in matrix.shape)
    left = torch.stack([torch.cos(sqrt(wave) * rows + place) for wave, _ in _WAVES])
    right = torch.stack([torch.cos(sqrt(wave) * columns) for _, wave in _WAVES])
    return [*((left @ matrix) * right).sum(1).div(norm).tolist(), log2(norm)]


def in_waves(matrix: Tensor) -> Tensor:
    """(rows, columns) -> (rows, 4): what is left of a large matrix, or of the right one of a product, to be checked."""
    columns = torch.arange(1, matrix.shape[1] + 1, device=matrix.device).float()
    waves = torch.stack([torch.cos(sqrt(wave) * columns) for _, wave in _WAVES])
    return matrix.float() @ waves.T


def check_derived(saved: Any, tensors: Iterator[tuple[str, Tensor]], source: str) -> None:
    """Compare the checksums of a file with what has been derived here.

    Raises:
        MismatchError: The adapter was trained with other frozen tensors.
    """
    here, saved = checksums(tensors), saved if isinstance(saved, dict) else {}
    wrong = [name for name, numbers in here.items() if not _agree(saved.get(name), numbers)]
    if wrong:
        raise MismatchError(
            f"{source}: {', '.join(wrong)}, derived here from config and base weight, are not what the adapter was "
            "trained with; load the base and the config it was saved with, or save it where it was trained with the "
            "option that keeps these tensors in the file",
            path=source,
            key=wrong[0],
            found={name: here[name] for name in wrong},
            expected={name: saved.get(name) for name in wrong},
        )


def _agree(saved: Any, here: list[float]) -> bool:
    if not isinstance(saved, list) or len(saved) != len(here) or not all(isinstance(old, float) for old in saved):
        return False
    return all(isclose(old, new, rel_tol=1e-3, abs_tol=TOLERANCE) for old, new in zip(saved, here))
