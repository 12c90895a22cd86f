"""The parameters of a layer: a new one in the place of another, and whether they are all there is to the layer."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn


def like(value: Tensor, old: Tensor) -> nn.Parameter:
    """`value` in the precision of `old`, and trained as that was."""
    return nn.Parameter(value.detach().to(old.dtype).clone(), requires_grad=old.requires_grad)


def is_finite(values: Tensor) -> bool:
    """Whether none is infinite or NaN. A sum that is neither says so in one pass; one that overflows says nothing."""
    if values.element_size() < 2:
        values = values.float()  # torch has no sum of eight-bit floats
    return math.isfinite(values.detach().sum()) or bool(values.isfinite().all())


def held(module: nn.Module, name: str) -> Any:
    """`getattr(module, name)` of a parameter, past `nn.Module.__getattr__`, which counts once per layer and token."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


_PLAIN = (nn.Parameter, Tensor)  # the latter in a functional call


def plainly_called(module: nn.Module) -> bool:
    """Whether calling a module is no more than its operation on the parameters it holds.

    Hooks, which offload, gather or watch, have to run, as has a forward that somebody has put on the instance; and a
    tensor of another kind, one that is spread over devices for instance, is multiplied by rules of its own.
    """
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooked and "forward" not in vars(module) and type(module._parameters.get("weight")) in _PLAIN
