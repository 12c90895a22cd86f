"""The rotation R(p) of rotary positions, found out from the model itself.   https://arxiv.org/abs/2104.09864

A key at position p is R(p) k: pairs of its dimensions turn by p * frequency. Models differ in which dimensions form a
pair, how many turn at all, and in which layers; so each way is tried on real keys, at two positions P apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltatune.errors import TargetError
from deltatune.prompts.capture import capture
from deltatune.prompts.example import ordinary_tokens
from deltatune.prompts.sites import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VARYING = ("dynamic", "longrope")  # frequencies that depend on the length of the text: no fixed rotation


@dataclass(frozen=True)
class Rotation:
    """Turns pairs of 2m dimensions, (j, j + m) or interleaved (2j, 2j + 1), by position * frequencies[j].

    They are the first, or, where a part without positions stands before them (latent attention), the `last` ones.
    """

    frequencies: Tensor
    interleaved: bool
    last: bool = False

    def __call__(self, keys: Tensor, position: int) -> Tensor:
        m = len(self.frequencies)
        angles = position * self.frequencies.to(device=keys.device, dtype=torch.float64)
        cos, sin = angles.cos().to(keys.dtype), angles.sin().to(keys.dtype)
        start = keys.shape[-1] - 2 * m if self.last else 0
        before, turning, after = keys.tensor_split([start, start + 2 * m], dim=-1)
        pairs = turning.unflatten(-1, (m, 2) if self.interleaved else (2, m))
        x, y = pairs.unbind(-1 if self.interleaved else -2)
        turned = torch.stack([x * cos - y * sin, y * cos + x * sin], -1 if self.interleaved else -2)
        return torch.cat([before, turned.flatten(-2), after], dim=-1)


def rotations(model: PreTrainedModel, sites: list[Site], count: int) -> list[Rotation]:
    """The rotation of each site's keys; without frequencies where a layer has no positions. TargetError if unknown."""
    ids = ordinary_tokens(model, 8)
    here = [key.float() for key, _ in capture(model, sites, ids)]
    there = [key.float() for key, _ in capture(model, sites, ids, first_position=count)]
    tolerance = 1e3 * max(torch.finfo(model.dtype).eps, torch.finfo(torch.float32).eps)
    found = []
    for site, before, after in zip(sites, here, there):
        scale = after.abs().max().clamp_min(1e-6)
        errors = [((way(before, count) - after).abs().max() / scale, way) for way in _ways(model, site.shape[1])]
        error, best = min(errors, key=lambda entry: float(entry[0]))
        if error > tolerance:
            raise TargetError(
                f"{type(model).__name__}: the keys of {site.name!r} move with the position in a way that is not known, "
                "so the prefix cannot be converted between the native layout and PEFT's",
                field="format",
            )
        found.append(best)
    return found


def _ways(model: PreTrainedModel, dim: int) -> Iterator[Rotation]:
    yield Rotation(torch.zeros(0), False)
    for module in model.modules():
        if "rotary" not in type(module).__name__.lower() or getattr(module, "rope_type", None) in _VARYING:
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and buffer.ndim == 1 and 2 * len(buffer) <= dim:
                for interleaved, last in product((False, True), repeat=2):
                    yield Rotation(buffer.detach(), interleaved, last)
