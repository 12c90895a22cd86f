"""A good adapter's folder to spoil, and what must be as before when loading it was refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from deltatune import LoraConfig, PeftModel, get_peft_model
from tests.core.tiny import batch, logits, tiny
from tests.laws.examples import move

INPUTS = batch("llama")
WEIGHTS, OLDER, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"


def adapted(seed: int = 0, **options: Any) -> PeftModel:
    model = get_peft_model(tiny("llama"), LoraConfig(task_type="CAUSAL_LM", **{"r": 4, **options})).eval()
    torch.manual_seed(seed)
    move(model)
    return model


@contextmanager
def refused(kind: type[Exception], *words: str) -> Iterator[None]:
    """The block raises this error, in one line that names all of the words."""
    with pytest.raises(kind) as caught:
        yield
    said = str(caught.value)
    assert "\n" not in said and all(word in said for word in words), said


def state(model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, bool]]:
    return {name: (tensor.detach().clone(), tensor.requires_grad) for name, tensor in model.named_parameters()}


def unchanged(model: torch.nn.Module, before: dict[str, tuple[torch.Tensor, bool]]) -> bool:
    now = state(model)
    return now.keys() == before.keys() and all(
        torch.equal(now[name][0], tensor) and now[name][1] == flag for name, (tensor, flag) in before.items()
    )


def load_is_refused(folder: Any, kind: type[Exception], *words: str, **options: Any) -> None:
    """By both ways of loading, and onto a name that is there; models, adapters and files are as before."""
    good = adapted(7)
    base, model = tiny("llama"), adapted(7)
    before, models = state(base), state(model)
    files = (
        {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()} if os.path.isdir(folder) else {}
    )
    ways: list[Callable[[], Any]] = [
        lambda: PeftModel.from_pretrained(base, folder, **options),
        lambda: model.load_adapter(folder, "second", **options),
        lambda: model.load_adapter(folder, "default", **options),
    ]
    for load in ways:
        with refused(kind, *words):
            load()
    assert unchanged(base, before) and unchanged(model, models) and list(model.peft_config) == ["default"]
    assert {path: path.read_bytes() for path in files} == files
    assert torch.equal(logits(model, INPUTS), logits(good, INPUTS))


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int, error: BaseException) -> Iterator[None]:
    """Inside of the block the call number `at` of a function fails."""
    real, count = getattr(owner, name), iter(range(10**9))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(count) == at:
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call)
        yield
