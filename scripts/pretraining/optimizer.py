"""Muon for the matrices, AdamW for the rest.   https://kellerjordan.github.io/posts/muon/

Matrices of one shape are orthogonalised together in one batched Newton-Schulz iteration: a small model has many small
matrices, and on a CPU the calls would cost more than the arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the quintic of the post: fast, and near 1 rather than exactly 1


def orthogonalise(matrices: Tensor, steps: int = 4) -> Tensor:
    """The nearest orthogonal matrices to a stack (n, rows, columns), roughly."""
    a, b, c = COEFFICIENTS
    wide = matrices.size(-2) <= matrices.size(-1)
    x = (matrices if wide else matrices.mT).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; the step has the root mean square of an AdamW step, so learning rates carry over."""

    def __init__(self, params: list, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                self._step_stack(group, shape, parameters)

    def _step_stack(self, group: dict, shape: torch.Size, parameters: list[nn.Parameter]) -> None:
        gradients = torch.stack([parameter.grad for parameter in parameters if parameter.grad is not None])
        state = self.state[parameters[0]]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradients)
        momentum = state["momentum"]
        momentum.lerp_(gradients, 1 - group["momentum"])
        update = orthogonalise(gradients.lerp(momentum, group["momentum"]))
        scale = 0.2 * max(shape) ** 0.5
        for parameter, change in zip(parameters, update, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=-group["lr"] * scale)


def build(model: nn.Module, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon on every matrix but the embeddings and the relative positions; queries slower, as T5 scales them small."""
    queries, matrices, rest = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2 or "shared" in name or "relative_attention_bias" in name:
            rest.append(parameter)
        elif name.endswith(".q.weight"):
            queries.append(parameter)
        else:
            matrices.append(parameter)
    groups = [{"params": matrices, "lr": lr}, {"params": queries, "lr": lr * 0.4}]
    adam = torch.optim.AdamW(rest, lr=3 * lr, betas=(0.9, 0.98), weight_decay=0.0, foreach=True)
    optimizers = [Muon(groups, lr=lr, weight_decay=weight_decay), adam]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
