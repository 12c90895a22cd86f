"""Random projections that all layers share: drawn from a seed once, and each layer uses the corner of its size."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from deltatune.adapter import LinearMap, Stored


def largest_sides(layers: Iterable[LinearMap]) -> tuple[int, int]:
    """Outputs and inputs of the smallest matrix of which every layer's is a corner."""
    sizes = [(layer.out_features, layer.in_features) for layer in layers]
    return max(out for out, _ in sizes), max(width for _, width in sizes)


def random_projection(*shape: int, generator: torch.Generator) -> Tensor:
    """Kaiming's uniform start, out of a generator of its own."""
    return nn.init.kaiming_uniform_(torch.empty(shape), generator=generator)


class Projections(Stored):
    """Frozen: A (rows, in) and B (out, r) for the largest layer.

    Args:
        name: Files call them name_A and name_B.
        keep: Files hold them; without, a checksum.
    """

    def __init__(self, layers: dict[str, LinearMap], name: str, rows: int, r: int, seed: int, keep: bool) -> None:
        super().__init__()
        self.keeps_derived, self.names = keep, (f"{name}_A", f"{name}_B")
        generator = torch.Generator().manual_seed(seed)
        out, width = largest_sides(layers.values())
        for key, shape in zip(self.names, ((rows, width), (out, r))):
            self.register_buffer(key, random_projection(*shape, generator=generator), persistent=False)

    def derived_tensors(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(name) for name in self.names}

    def corners(self, layer_sides: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """A (rows, in) and B (out, r) of a layer with these sides (out, in)."""
        (A, B), (out, width) = self.derived_tensors().values(), layer_sides
        return A[:, :width].to(device), B[:out].to(device)
