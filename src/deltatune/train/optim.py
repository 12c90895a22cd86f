"""What moves the parameters: an optimizer over those that train, a schedule, and the check that all is finite."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from deltatune.errors import StateError
from deltatune.optimizers.lorafa import build_lorafa_optimizer
from deltatune.optimizers.loraplus import loraplus_groups
from deltatune.optimizers.riemannian import precondition
from deltatune.train.settings import TrainSettings


def build_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise StateError("no parameter of the model is trainable; check the method and its targets", field="method")
    return _OPTIMIZERS[settings.optimizer](model, settings, trained)


def _adamw(model: nn.Module, settings: TrainSettings, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    # biases, norms and scaling vectors are not shrunk
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return _torch_adamw([group for group in groups if group["params"]], settings)


def _loraplus(model: nn.Module, settings: TrainSettings, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    rate, decay = settings.resolved_learning_rate, settings.weight_decay
    ratio = settings.loraplus_lr_ratio
    groups = loraplus_groups(
        model, lr=rate, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay, loraplus_lr_embedding=rate
    )
    return _torch_adamw([group for group in groups if group["params"]], settings)


def _lorafa(model: nn.Module, settings: TrainSettings, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = build_lorafa_optimizer(model, settings.resolved_learning_rate, settings.weight_decay)
    betas = (settings.adam_beta1, settings.adam_beta2)
    optimizer.param_groups[0].update(betas=betas, eps=settings.adam_epsilon)
    return optimizer


def _riemannian(model: nn.Module, settings: TrainSettings, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    return precondition(model, _adamw(model, settings, trained))


def _torch_adamw(groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups,
        lr=settings.resolved_learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
    )


_OPTIMIZERS = {"adamw": _adamw, "loraplus": _loraplus, "lorafa": _lorafa, "riemannian": _riemannian}


def build_scheduler(optimizer: torch.optim.Optimizer, settings: TrainSettings, total_steps: int) -> Any:
    from transformers import get_scheduler

    warmup = settings.warmup_steps
    if warmup is None:
        warmup = math.ceil(settings.warmup_ratio * total_steps)
    return get_scheduler(
        settings.lr_scheduler_type, optimizer, num_warmup_steps=min(warmup, total_steps), num_training_steps=total_steps
    )


def first_bad_gradient(model: nn.Module) -> str | None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return name
    return None


def first_bad_parameter(model: nn.Module) -> str | None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            return name
    return None
