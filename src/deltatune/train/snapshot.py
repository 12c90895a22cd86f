"""A running training as a checkpoint, and back: trained tensors, optimizer, scheduler, random states, position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import ResumeError
from deltatune.model import PeftModel
from deltatune.schedule import pack, unpack
from deltatune.train import randomness
from deltatune.train.checkpoint import Checkpoint
from deltatune.train.processes import gathered


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: every parameter with a gradient, and the buffers of modules that hold nothing frozen.

    A schedule may have frozen what was trained before.
    """
    schedules = model.base_model.schedules.values() if isinstance(model, PeftModel) else ()
    scheduled = {id(p) for schedule in schedules if schedule.trains for p in schedule.parameters().values()}

    def trains(parameter: nn.Parameter) -> bool:
        return parameter.requires_grad or id(parameter) in scheduled

    tensors = {name: parameter.detach() for name, parameter in model.named_parameters() if trains(parameter)}
    for path, module in model.named_modules():
        own = list(module.parameters())
        if own and all(map(trains, own)):
            for name, buffer in module.named_buffers(path, recurse=False):
                tensors[name] = buffer.detach()
    return tensors


def take(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    progress: dict[str, Any],
    facts: dict[str, Any],
    accelerator: Any,
) -> Checkpoint:
    """`progress` says where the run is, `facts` under which conditions it runs. All processes take part."""
    moments, settings = _optimizer_out(model, optimizer)
    random_tensors, random_values = _random_out(accelerator)
    scheduled, plain = pack(model.base_model.schedules) if isinstance(model, PeftModel) else ({}, {})
    state = {
        "progress": progress,
        "conditions": facts,
        "optimizer": settings,
        "scheduler": {key: value for key, value in scheduler.state_dict().items() if _plain(value)},
        "random": random_values,
        "schedule": plain,
    }
    trained = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}  # tied ones stand alone
    groups = {"trainable": trained, "optimizer": moments, "random": random_tensors, "schedule": scheduled}
    return Checkpoint(groups, state)


def put_back(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    source: str,
    accelerator: Any,
) -> None:
    """Everything but the position, which the loop reads from `state["progress"]`."""
    present = trained_tensors(model)
    stored = checkpoint.tensors["trainable"]
    for name in sorted(present.keys() | stored.keys()):
        here, there = present.get(name), stored.get(name)
        if here is None or there is None or here.shape != there.shape:
            raise ResumeError(
                f"{source}: tensor {name} is {_shape(there)} in the checkpoint and {_shape(here)} in the model; "
                "resume with the settings and the base it was written with",
                path=source,
                key=name,
                found=_shape(there),
                expected=_shape(here),
            )
    put_back_tensors(checkpoint, model)
    _optimizer_in(checkpoint, model, optimizer)
    scheduler.load_state_dict({**scheduler.state_dict(), **checkpoint.state["scheduler"]})
    _random_in(checkpoint, accelerator)


def _random_out(accelerator: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The random states of all processes; the first one's under plain names, as a run of one process has them."""
    first, *others = gathered(accelerator, randomness.capture())
    tensors, values = dict(first[0]), dict(first[1])
    for number, (states, plain) in enumerate(others, 1):
        tensors |= {f"{_process(number)}{name}": state for name, state in states.items()}
        values[_process(number)] = plain
    return tensors, values


def _random_in(checkpoint: Checkpoint, accelerator: Any) -> None:
    """Put back this process's own. In another number of processes they start afresh (`randomness.seed_process`)."""
    tensors, values = checkpoint.tensors["random"], checkpoint.state["random"]
    if accelerator.num_processes != 1 + sum(name.startswith("process.") for name in values):
        return
    if number := accelerator.process_index:
        start = _process(number)
        tensors = {name.removeprefix(start): state for name, state in tensors.items() if name.startswith(start)}
        values = values[start]
    randomness.restore(tensors, values)


def _process(number: int) -> str:
    return f"process.{number}."


def put_back_tensors(checkpoint: Checkpoint, model: nn.Module) -> None:
    """What is trained, and what its schedules have decided about it."""
    stored = checkpoint.tensors["trainable"]
    with torch.no_grad():
        for name, tensor in trained_tensors(model).items():
            tensor.copy_(stored[name])
    if isinstance(model, PeftModel):
        unpack(model.base_model.schedules, checkpoint.tensors["schedule"], checkpoint.state.get("schedule", {}))


def _optimizer_out(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{key}/{names[parameter]}"] = value
            else:
                plain.setdefault(key, {})[names[parameter]] = value
    groups = [{k: v for k, v in group.items() if k != "params" and _plain(v)} for group in optimizer.param_groups]
    return tensors, {"groups": groups, "values": plain}


def _optimizer_in(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = dict(model.named_parameters())
    settings = checkpoint.state["optimizer"]
    for group, stored in zip(optimizer.param_groups, settings["groups"], strict=True):
        group.update(stored)
        if "betas" in stored:
            group["betas"] = tuple(stored["betas"])  # JSON knows lists only
    for place, tensor in checkpoint.tensors["optimizer"].items():
        key, name = place.split("/", 1)
        parameter = parameters[name]
        # Adam's step count stays where it is, the moments follow the parameter
        value = tensor if tensor.ndim == 0 else tensor.to(parameter.device)
        optimizer.state[parameter][key] = value.clone()
    for key, values in settings["values"].items():
        for name, value in values.items():
            optimizer.state[parameters[name]][key] = value


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(part) for part in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"of shape {tuple(tensor.shape)}"
