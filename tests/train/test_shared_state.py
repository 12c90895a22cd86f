"""A run beside accelerate's state that another library of the same interpreter has made: a Trainer, a notebook."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from deltatune.errors import ConfigError
from deltatune.train import processes, train
from tests.train.test_processes import losses


@pytest.fixture(autouse=True)
def own_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_half_precision_of_another_is_not_ours(settings_into: Any, tmp_path: Path) -> None:
    train(settings_into(tmp_path / "alone"))
    AcceleratorState._reset_state(reset_partial_state=True)
    theirs = Accelerator(cpu=True, mixed_precision="bf16")
    train(settings_into(tmp_path / "beside"))
    assert losses(tmp_path / "beside") == losses(tmp_path / "alone") != []
    assert theirs.mixed_precision == "bf16" and theirs.native_amp, "the other's state was changed"


def test_the_state_of_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = Accelerator(cpu=True)
    monkeypatch.setattr(PartialState(), "device", torch.device("cuda", 0))
    with pytest.raises(ConfigError, match="started on cuda:0 in this process") as refused:
        processes.meet("cpu")
    assert refused.value.field == "device"
    assert theirs.state is not None
