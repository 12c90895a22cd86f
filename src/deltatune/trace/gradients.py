"""Who received gradient: norms, and the reason where nothing arrived."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deltatune.errors import StateError
from deltatune.trace.report import DEAD, FROZEN, LIVE, UNKNOWN, WAITING, Gradient, Parameter


class Gradients:
    """Gradients of a loss by the tensor they belong to. Nothing is written into `.grad`."""

    def __init__(self, loss: Tensor | None, wanted: Sequence[Tensor]) -> None:
        self.has_loss = loss is not None
        self.found: dict[int, Tensor | None] = {}
        asked = list({id(tensor): tensor for tensor in wanted if tensor.requires_grad}.values())
        if loss is None or not loss.requires_grad or not asked:
            return
        if _is_reentrant(loss):
            raise StateError(
                "trace: reentrant gradient checkpointing hides the layers from the trace; call "
                "gradient_checkpointing_disable(), or enable it with gradient_checkpointing_kwargs="
                "{'use_reentrant': False}",
                field="use_reentrant",
                found=True,
                expected=False,
            )
        grads = torch.autograd.grad(loss, asked, allow_unused=True)
        self.found = {id(tensor): grad for tensor, grad in zip(asked, grads)}

    def of(self, tensor: Tensor) -> Tensor | None:
        return self.found.get(id(tensor))

    def judge(self, tensor: Tensor, columns: slice | None = None, reason: str = "") -> Gradient:
        """The gradient of a tensor, or of some of its columns; `reason` is used where it is missing or zero."""
        if not tensor.requires_grad:
            return Gradient(FROZEN, zeros=_cut(tensor, columns).numel(), reason="not trainable in this state")
        if not self.has_loss:
            return Gradient(UNKNOWN, reason="no loss")
        grad = self.of(tensor)
        if grad is None:
            return Gradient(DEAD, None, _cut(tensor, columns).numel(), reason or "the loss does not depend on it")
        grad = _cut(grad, columns)
        norm = float(torch.linalg.vector_norm(grad.float()))
        zeros = grad.numel() - int(torch.count_nonzero(grad))
        if not torch.isfinite(grad).all():
            return Gradient(DEAD, None, zeros, "its gradient is not finite")
        if zeros == grad.numel():
            return Gradient(DEAD, 0.0, zeros, reason or "its gradient is exactly zero for this batch")
        return Gradient(LIVE, norm, zeros)

    def parameter(self, name: str, parameter: Tensor, reason: str = "") -> Parameter:
        norm = float(torch.linalg.vector_norm(parameter.detach().float()))
        return Parameter(name, list(parameter.shape), norm, self.judge(parameter, reason=reason))

    def parameters(self, module: nn.Module, reason: str = "") -> list[Parameter]:
        """Every parameter of a module that trains together, such as an adapter.

        A zero gradient beside live ones is one that waits where another factor of the product is still zero, as LoRA's
        A does before the first step.
        """
        made = [self.parameter(name, parameter, reason) for name, parameter in module.named_parameters()]
        if any(parameter.gradient.state == LIVE for parameter in made):
            still_zero = [parameter.name for parameter in made if parameter.norm == 0]
            for parameter in made:
                others = [name for name in still_zero if name != parameter.name]
                if parameter.gradient.state == DEAD and parameter.gradient.norm == 0 and others:
                    parameter.gradient.state = WAITING
                    parameter.gradient.reason = f"{' and '.join(others)} still zero: from the second step on"
        return made


def _cut(tensor: Tensor, columns: slice | None) -> Tensor:
    return tensor if columns is None else tensor[:, columns]


def _is_reentrant(loss: Tensor) -> bool:
    """Whether a reentrant checkpoint is part of the graph: its node does not know the parameters below it."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            return True
        todo += [following for following, _ in node.next_functions]
    return False
