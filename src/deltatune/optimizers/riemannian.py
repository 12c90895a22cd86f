"""Riemannian preconditioning: g_A <- (B^T B + reg I)^-1 g_A and g_B <- g_B (A A^T + reg I)^-1 before every step.

The same update of B A then follows from every way of splitting it into two factors.   https://arxiv.org/abs/2402.02347
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deltatune.checks import finite_positive
from deltatune.errors import ConfigError, StateError
from deltatune.factors import at_least_single
from deltatune.optimizers.pairs import Pair, matrix, none_found, trained_pairs


class Preconditioner:
    """What an optimizer calls before its step: turns the gradients of LoRA's factors, in place.

    Args:
        reg: Added to the diagonals before they are inverted.
    """

    def __init__(self, pairs: list[Pair], reg: float) -> None:
        self.pairs, self.reg = pairs, reg

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            raise StateError(
                "a Riemannian optimizer takes no closure, which would compute new gradients after these have been "
                "preconditioned; call loss.backward() and then optimizer.step()",
                field="closure",
            )
        for pair in self.pairs:
            A, B = (_wide(matrix(factor)) for factor in (pair.A, pair.B))
            if pair.A.grad is not None:
                g = matrix(pair.A.grad)
                g.copy_(self._inverse(B.T @ B) @ g.to(A.dtype))
            if pair.B.grad is not None:
                g = matrix(pair.B.grad)
                g.copy_(g.to(A.dtype) @ self._inverse(A @ A.T))

    def _inverse(self, gram: Tensor) -> Tensor:
        eye = torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
        return torch.linalg.pinv(gram + self.reg * eye, hermitian=True)  # a factor may have dependent rows


def precondition(model: nn.Module, optimizer: Optimizer, reg: float = 1e-2) -> Optimizer:
    """Let any optimizer of torch take its steps on preconditioned gradients; it is returned.

    It is done by a hook. Hooks are no part of an optimizer's state, nor of a pickled or copied optimizer: build the
    optimizer anew and load its state dict.

    Raises:
        StateError: No LoRA of linear layers trains.
    """
    finite_positive("precondition", "reg", reg)
    # A grouped convolution's B is block-diagonal, and an embedding's rows learn one token at a time
    pairs = [p for p in trained_pairs(model) if p.A.ndim == 2 and p.A.requires_grad and not p.embedding]
    if not pairs:
        raise none_found("create_riemannian_optimizer")
    optimizer.register_step_pre_hook(Preconditioner(pairs, reg))
    return optimizer


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An optimizer of the given class over what trains; the gradients of LoRA's factors are preconditioned.

    Only the factors of linear layers are; all other parameters take the class's own step.

    Raises:
        ConfigError: The class is no optimizer, or one that needs a closure (LBFGS).
        StateError: No LoRA of linear layers trains.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise ConfigError(
            f"create_riemannian_optimizer: optimizer_cls={optimizer_cls!r}, expected a subclass of "
            "torch.optim.Optimizer, such as torch.optim.AdamW",
            field="optimizer_cls",
            found=optimizer_cls,
        )
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"create_riemannian_optimizer: {optimizer_cls.__name__} computes the loss several times in a step, and "
            "gradients are preconditioned once before it; use AdamW, SGD or another one without a closure",
            field="optimizer_cls",
            found=optimizer_cls.__name__,
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise none_found("create_riemannian_optimizer")
    return precondition(model, optimizer_cls(trained, lr=lr, **kwargs), reg)  # type: ignore[call-arg]


def _wide(factor: Tensor) -> Tensor:
    return factor.detach().to(at_least_single(factor))
