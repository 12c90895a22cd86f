"""An outline of a model: its modules without adapters, on which a new adapter is built while the model runs."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from deltatune.copies import TrainedCopies
from deltatune.layer import AdaptedLayer
from deltatune.shared import SharedModules


def outline(model: nn.Module) -> nn.Module:
    """The bare model once more, with the same layers and parameters; what is put onto it is not on the model."""
    return _twin(model, {})


def _twin(module: Any, done: dict[int, nn.Module]) -> nn.Module:
    if isinstance(module, AdaptedLayer):
        module = module.base_layer
    elif isinstance(module, TrainedCopies):
        module = module.original_module
    if not module._modules:
        return module  # a layer is wrapped where its parent holds it
    if id(module) not in done:
        twin = done[id(module)] = object.__new__(type(module))
        children = {name: child for name, child in module._modules.items() if not isinstance(child, SharedModules)}
        own = {name: copy.copy(value) if isinstance(value, dict) else value for name, value in vars(module).items()}
        twin.__dict__.update(own, _modules={})  # hooks, too, are registered here or there
        for name, child in children.items():
            twin._modules[name] = None if child is None else _twin(child, done)
    return done[id(module)]
