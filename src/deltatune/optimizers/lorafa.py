"""LoRA-FA: A is frozen, and B takes the step whose update is nearest to that of a full fine-tuning.

With the gradient g of B, the step's direction is g' = g (A A^T)^-1 / s^2, the least-squares answer to s g' A = G for
the gradient G of the whole weight.   https://arxiv.org/abs/2308.03303
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deltatune.checks import finite_positive
from deltatune.errors import ConfigError
from deltatune.factors import at_least_single
from deltatune.notice import warn
from deltatune.optimizers.pairs import Pair, matrix, none_found, trained_pairs

_DAMPING = 1e-8


class LoraFAOptimizer(Optimizer):
    """AdamW, with the gradients of B factors projected first. State and steps of all other parameters are AdamW's.

    Args:
        params: Parameters or groups of them; frozen ones are passed over.
        pairs: The factors that belong together.
        correct_bias: Divide the moments by what their zero start lacks, as Adam does.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        pairs: Iterable[Pair] = (),
    ) -> None:
        _check(lr, betas, eps)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)
        self.pairs = {pair.B: pair for pair in pairs}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "pairs": self.pairs}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, self._direction(parameter), group)
        return loss

    def _direction(self, parameter: nn.Parameter) -> Tensor:
        pair, gradient = self.pairs.get(parameter), parameter.grad
        assert gradient is not None
        if pair is None:
            return gradient
        A, g = matrix(pair.A), matrix(gradient)
        A = A.to(at_least_single(A))
        gram = A @ A.T + _DAMPING * torch.eye(len(A), device=A.device, dtype=A.dtype)
        projected = g.to(A.dtype) @ torch.linalg.pinv(gram, hermitian=True) / pair.scaling**2
        return projected.to(gradient.dtype).view_as(gradient)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        first, second = state["exp_avg"], state["exp_avg_sq"]
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = group["lr"]
        if group["correct_bias"]:
            size *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        parameter.addcdiv_(first, second.sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> LoraFAOptimizer:
    """Freeze the A factors of the LoRA that trains, and build the optimizer of the rest.

    Args:
        r, lora_alpha: Accepted for PEFT's sake; each layer's own rank and scaling are used, and a warning says where
            they differ.
        use_rslora: Likewise; it belongs into `LoraConfig`.

    Raises:
        StateError: No LoRA of the model trains.
        ConfigError: `use_rslora` contradicts an active adapter's config. The model is left as it was.
    """
    finite_positive("create_lorafa_optimizer", "lr", lr)
    _compare(model, list(trained_pairs(model)), r, lora_alpha, use_rslora)
    return build_lorafa_optimizer(model, lr, weight_decay)


def build_lorafa_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.0) -> LoraFAOptimizer:
    """`create_lorafa_optimizer` without the numbers that the layers know."""
    pairs = list(trained_pairs(model))
    if not pairs:
        raise none_found("create_lorafa_optimizer")
    for pair in pairs:
        pair.A.requires_grad_(False)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    scalings = {id(pair.B): pair.scaling for pair in pairs}
    group = {
        "params": [parameter for _, parameter in trained],
        "names": [name for name, _ in trained],
        "scaling_factors": [scalings.get(id(parameter)) for _, parameter in trained],
    }
    return LoraFAOptimizer([group], lr=lr, weight_decay=weight_decay, pairs=pairs)


def _compare(model: nn.Module, pairs: list[Pair], r: int, alpha: float, rslora: bool | None) -> None:
    """What the caller says of the scaling, with what the layers have."""
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    active = [configs[name] for name in getattr(model, "active_adapters", ()) if name in configs]
    for config in active:
        has = bool(getattr(config, "use_rslora", False))
        if rslora is not None and rslora != has:
            raise ConfigError(
                f"create_lorafa_optimizer: use_rslora={rslora}, but the active adapter's config says {has}; "
                "leave the argument out, LoraConfig(use_rslora=...) decides",
                field="use_rslora",
                found=rslora,
                expected=has,
            )
    rooted = rslora if rslora is not None else bool(active) and all(getattr(c, "use_rslora", False) for c in active)
    told = alpha / math.sqrt(r) if rooted else alpha / r
    others = [pair for pair in pairs if not math.isclose(pair.scaling, told, rel_tol=1e-6)]
    if others:
        warn(
            f"create_lorafa_optimizer: r={r} and lora_alpha={alpha:g} give a scaling of {told:g}, {len(others)} of "
            f"{len(pairs)} layers have another (the first is {others[0].path}, {others[0].scaling:g}); theirs are used"
        )


def _check(lr: float, betas: tuple[float, float], eps: float) -> None:
    faults = [("lr", lr, lr < 0), ("betas", betas, not all(0 <= beta < 1 for beta in betas)), ("eps", eps, eps < 0)]
    for name, value, wrong in faults:
        if wrong:
            expected = "two numbers from 0 to below 1" if name == "betas" else "a number of 0 or more"
            raise ConfigError(f"LoraFAOptimizer: {name}={value!r}, expected {expected}", field=name, found=value)
