"""Adapters that cross over between PEFT 0.21.2 and us, and training from the same start on both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import deltatune
from tests.core.tiny import batch, logits, tiny
from tests.peer.pairs import loaded_by_peft, saved_by_peft, scatter, theirs

EXACT = {"rtol": 1e-5, "atol": 1e-5}


def crosses_over(
    their_config: Any,
    our_config: Any,
    arch: str,
    folder: Path,
    back: bool = True,
    tolerance: dict = EXACT,
    format: str | None = None,
) -> tuple[Any, Any]:
    """Both ways, and what we save of PEFT's adapter is what PEFT saved; returns PEFT's model and one of ours.

    Args:
        back: Whether PEFT reads what we write; False where it cannot express or load it.
        format: In which ours is saved for PEFT.
    """
    model, inputs = theirs(arch, their_config), batch(arch)
    expected = logits(model, inputs)
    with torch.no_grad(), model.disable_adapter():
        assert not torch.allclose(logits(model, inputs), expected, atol=1e-3), "PEFT's adapter does nothing here"
    ours = deltatune.PeftModel.from_pretrained(tiny(arch), saved_by_peft(model, folder / "theirs"))
    assert_close(logits(ours, inputs), expected, **tolerance)

    ours.save_pretrained(folder / "again")
    again = deltatune.PeftModel.from_pretrained(tiny(arch), folder / "again")
    assert_close(logits(again, inputs), logits(ours, inputs), rtol=1e-6, atol=1e-6)
    torch.manual_seed(5)
    made = scatter(deltatune.get_peft_model(tiny(arch), our_config), 11)
    if back:
        assert_close(logits(loaded_by_peft(tiny(arch), folder / "again"), inputs), expected, **tolerance)
        made.save_pretrained(folder / "ours", format=format)
        assert_close(logits(loaded_by_peft(tiny(arch), folder / "ours"), inputs), logits(made, inputs), **tolerance)
    return model, made


def losses(model: Any, arch: str, steps: int, lr: float = 3e-3) -> list[float]:
    """Of AdamW on four batches in turn."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    found = []
    for step in range(steps):
        loss = model(**batch(arch, rows=3, seed=step % 4)).loss
        found.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


def trains_alike(their_config: Any, arch: str, folder: Path, steps: int = 20, lr: float = 3e-3) -> None:
    """The losses of PEFT's adapter and of the same adapter here agree to 1e-4, and fall."""
    model = theirs(arch, their_config)
    ours = deltatune.PeftModel.from_pretrained(tiny(arch), saved_by_peft(model, folder), is_trainable=True)
    assert ours.get_nb_trainable_parameters()[0] == model.get_nb_trainable_parameters()[0]
    expected = losses(model, arch, steps, lr)
    assert expected[-4] < expected[0], "the same batch"
    assert losses(ours, arch, steps, lr) == pytest.approx(expected, abs=1e-4)
