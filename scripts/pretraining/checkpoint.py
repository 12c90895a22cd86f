"""Checkpoints without pickle: two safetensors files and a JSON file, the JSON last."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def _flat(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for index, optimizer in enumerate(optimizers):
        for number, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"{index}/{number}/{key}"] = torch.as_tensor(value).contiguous()
    return tensors


def save(folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(weights, folder / "weights.safetensors.new")
    save_file(_flat(optimizers), folder / "optimizers.safetensors.new")
    (folder / "state.json.new").write_text(json.dumps(state), encoding="utf-8")
    for name in ("weights.safetensors", "optimizers.safetensors", "state.json"):
        os.replace(folder / f"{name}.new", folder / name)


def load(folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in load_file(folder / "weights.safetensors").items():
            named[name].copy_(value)
    tensors = load_file(folder / "optimizers.safetensors")
    for index, optimizer in enumerate(optimizers):
        whole = optimizer.state_dict()
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            owner, number, key = name.split("/")
            if int(owner) == index:
                states.setdefault(int(number), {})[key] = value
        optimizer.load_state_dict({"state": states, "param_groups": whole["param_groups"]})
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))
