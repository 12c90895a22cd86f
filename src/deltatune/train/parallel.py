"""One model in several processes: what trains is in each, and its gradients are averaged by DDP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deltatune.data.example import TEXT_TASKS
from deltatune.model import PeftModel
from deltatune.train import randomness
from deltatune.train.base import autocast
from deltatune.train.settings import TrainSettings
from deltatune.train.sharding import sharded


def prepare(
    accelerator: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    settings: TrainSettings,
) -> tuple[nn.Module, Any]:
    """Model and optimizer as the steps call them.

    Args:
        batch: A row, on the CPU.
    """
    if accelerator.num_processes == 1:
        return accelerator.prepare(model, optimizer)
    accelerator.ddp_handler.find_unused_parameters = leaves_some_out(model, batch, settings, accelerator.device)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    frozen += [name for name, _ in model.named_buffers()]
    # the base is equal everywhere already (`check_equal`) and need not go over the network, at no step and not at first
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    if not sharded(model):
        return accelerator.prepare(model, optimizer)
    # accelerate refuses DDP around shards, without looking whether DDP is to ignore them
    options = accelerator.ddp_handler.to_kwargs()
    devices = None if accelerator.device.type == "cpu" else [accelerator.device]
    return DistributedDataParallel(model, device_ids=devices, **options), accelerator.prepare(optimizer)


def leaves_some_out(model: nn.Module, batch: dict[str, Tensor], settings: TrainSettings, device: torch.device) -> bool:
    """Whether a backward pass can go without some trained parameter: of other rows' experts, frozen by a schedule.

    DDP waits for the gradients of all of them, unless it is told to look for those that will not come; looking where
    none are missing costs time and makes it warn. So one row is tried.
    """
    if isinstance(model, PeftModel) and model.base_model.schedules:
        return True
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    placed = {name: tensor.to(device) for name, tensor in batch.items()}
    if settings.task in TEXT_TASKS:
        placed["use_cache"] = False  # type: ignore[assignment]
    was_training = model.training
    model.eval()  # nothing is to change: no statistics, no random numbers
    with randomness.untouched(), autocast(settings, device):
        found = torch.autograd.grad(model(**placed).loss, trained, allow_unused=True)
    model.train(was_training)
    return any(gradient is None for gradient in found)
