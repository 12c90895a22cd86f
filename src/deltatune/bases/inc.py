"""Intel Neural Compressor's `INCWeightOnlyLinear`, which unpacks its codes for good at its first call."""

from __future__ import annotations

import sys

from torch import nn

from deltatune.bases.packed import Opaque


class INC(Opaque):
    """Read by the identity before and after that call; `weight` is a buffer then, and is not written to."""

    scheme = "inc"
    types = ("INCWeightOnlyLinear",)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        library = sys.modules.get("neural_compressor.torch.algorithms.weight_only.modules")
        return library is not None and isinstance(module, library.INCWeightOnlyLinear)
