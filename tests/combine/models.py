"""A model of every kind of layer that LoRA adapts, adapters on it, and the dense equation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltatune import LoraConfig, PeftModel, get_peft_model
from deltatune.inject import adapted_layers

LAYERS = ["embed", "linear", "turned", "conv", "grouped", "head"]


class Mixed(nn.Module):
    """Embedding (9 tokens, width 6), linear, Conv1D, two convolutions, one of them grouped, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.linear = nn.Linear(6, 8)
        self.turned = Conv1D(8, 8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.grouped = nn.Conv1d(6, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.turned(self.linear(self.embed(ids)).tanh()).tanh()
        h = self.grouped(self.conv(h.mT).tanh()).mT
        return self.head(h)


IDS = torch.tensor([[0, 3, 8, 2], [5, 1, 1, 7]])


def base(seed: int = 0) -> Mixed:
    torch.manual_seed(seed)
    return Mixed().eval()


def move(model: Any, name: str, seed: int, scale: float = 0.3) -> None:
    """An adapter off its start."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in adapted_layers(model.get_base_model()):
        if name in layer.adapters:
            for parameter in layer.adapters[name].parameters():
                parameter.data.add_(scale * torch.randn(parameter.shape, generator=generator))


def with_adapters(configs: dict[str, Any], seed: int = 0, model: nn.Module | None = None) -> PeftModel:
    (first, config), *others = configs.items()
    made = get_peft_model(base(seed) if model is None else model, config, adapter_name=first)
    for name, config in others:
        made.add_adapter(name, config)
    for index, name in enumerate(configs):
        move(made, name, 10 + index)
    return made.eval()


def lora(r: int = 2, alpha: float = 3, targets: Any = LAYERS, **options: Any) -> LoraConfig:
    names = targets if isinstance(targets, str) else list(targets)
    return LoraConfig(r=r, lora_alpha=alpha, target_modules=names, **options)


def deltas(model: PeftModel, name: str) -> dict[str, Tensor]:
    """W' - W (out, in) by path."""
    found = {}
    with torch.no_grad():
        for path, layer in adapted_layers(model.get_base_model()):
            if name in layer.adapters:
                found[path] = layer.as_map([name]).weight - layer.as_map().weight
    return found


def summed(model: PeftModel, names: list[str], weights: list[float]) -> dict[str, Tensor]:
    """The weighted sum of the changes, dense."""
    found: dict[str, Tensor] = {}
    for name, weight in zip(names, weights):
        for path, delta in deltas(model, name).items():
            found[path] = found.get(path, 0) + weight * delta
    return found


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for path, delta in expected.items():
        assert got[path].shape == delta.shape, path
        torch.testing.assert_close(got[path], delta, rtol=tolerance, atol=tolerance)
