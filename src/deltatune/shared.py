"""Tensors that several layers share: one module per adapter, held once at the root of the model.

The root is where it has to be: optimizers and state dicts then see each tensor once, it moves with the model, and FSDP
keeps it gathered while the layers run. The adapters refer to it without being its parents.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from deltatune.adapter import Stored
from deltatune.errors import StateError

SHARED = "shared_by_adapters"  # the name in the model


class SharedModules(nn.ModuleDict):
    """What adapters share, by adapter name."""

    def forward(self, x: Any) -> Any:
        return x  # an nn.Sequential calls all that it holds


def shared_modules(model: nn.Module) -> dict[str, Stored]:
    """Adapter name -> what its layers share, of a bare (perhaps adapted) model."""
    found = model._modules.get(SHARED)
    return dict(found.items()) if isinstance(found, SharedModules) else {}  # type: ignore[arg-type]


def add_shared(model: nn.Module, name: str, shared: Stored) -> None:
    present = getattr(model, SHARED, None)
    if present is not None and not isinstance(present, SharedModules):
        raise StateError(
            f"{type(model).__name__} has a {SHARED!r} of its own, where adapters keep what layers share",
            field="model",
            found=type(present).__name__,
            expected="no such attribute",
        )
    if present is None:
        present = model._modules[SHARED] = SharedModules()
    present[name] = shared.train(model.training)


def remove_shared(model: nn.Module, name: str) -> None:
    held = model._modules.get(SHARED)
    if isinstance(held, SharedModules) and name in held:
        held.pop(name)
        if not len(held):
            strip_shared(model)


def strip_shared(model: nn.Module) -> None:
    if isinstance(model._modules.get(SHARED), SharedModules):
        del model._modules[SHARED]
