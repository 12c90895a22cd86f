"""What models do with logits before the loss, in the form that the kernel has: softcap * tanh(scale * z / softcap)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltatune.loss.logits import LOGITS, Step

_ADD = {"add", "__add__", "__radd__"}
_MULTIPLY = {"mul", "__mul__", "__rmul__"}
_DIVIDE = {"div", "true_divide", "__truediv__"}


@dataclass(frozen=True)
class Form:
    """Logits as scale * (h W^T + bias), within a softcap."""

    scale: float
    softcap: float | None
    bias: Tensor | None

    def with_bias(self, bias: Tensor | None) -> Tensor | None:
        if self.bias is None:
            return bias
        return self.bias if bias is None else bias + self.bias


def kernel_form(steps: Iterable[Step]) -> Form | None:
    """The same as a form; None where there is none, and each step has to be taken."""
    inner, outer, capped = 1.0, 1.0, False
    bias: Tensor | None = None
    for step in steps:
        name, others = step.function.__name__, [part for part in step.args if part is not LOGITS]
        value = others[0] if others else None
        if name == "to" and value is torch.float32:  # the kernel's own precision
            continue
        factor = _factor(name, value, step.args[0] is LOGITS)
        if factor is not None and capped:
            outer *= factor
        elif factor is not None:
            inner *= factor
        elif name == "tanh" and not capped:
            capped = True
        elif name in _ADD and isinstance(value, Tensor) and inner == 1.0 and not capped and bias is None:
            bias = value.reshape(-1)
            if bias.numel() == 1:
                return None
        else:
            return None
    if not capped:
        return Form(inner, None, bias)
    return Form(inner * outer, outer, bias) if outer else None


def _factor(name: str, value: object, logits_first: bool) -> float | None:
    if not isinstance(value, (int, float)):
        return None
    if name in _MULTIPLY:
        return float(value)
    return 1 / value if name in _DIVIDE and logits_first and value else None
