"""Equal seeds give equal adapters, and leave the generator where PEFT leaves it."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

import deltatune

WHOLE = ["lin", "emb", "c2", "c1"]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("LoraConfig", {"target_modules": WHOLE, "r": 4}),
    ("LoraConfig", {"target_modules": WHOLE, "r": 4, "init_lora_weights": "gaussian"}),
    ("LoraConfig", {"target_modules": WHOLE, "r": 4, "init_lora_weights": False}),
    ("LoraConfig", {"target_modules": ["lin", "c2"], "r": 4, "lora_bias": True}),
    ("LoraConfig", {"target_modules": ["lin"], "r": 4, "lora_bias": True, "init_lora_weights": False}),
    ("LoraConfig", {"target_modules": ["lin"], "r": 4, "use_dora": True}),
    ("AdaLoraConfig", {"target_modules": ["lin"], "total_step": 10}),
    ("IA3Config", {"target_modules": ["lin", "c2"], "feedforward_modules": []}),
    ("LoHaConfig", {"target_modules": ["lin", "c2", "c1"]}),
    ("LoHaConfig", {"target_modules": ["c2", "c1"], "use_effective_conv2d": True}),
    ("LoKrConfig", {"target_modules": ["lin", "c2", "c1"]}),
    ("LoKrConfig", {"target_modules": ["lin", "c2"], "decompose_both": True, "r": 2, "init_weights": "lycoris"}),
    ("OFTConfig", {"target_modules": ["lin"], "oft_block_size": 4, "r": 0}),
    ("VeraConfig", {"target_modules": ["lin"], "r": 4}),
]


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"lin": nn.Linear(12, 8), "emb": nn.Embedding(10, 8), "c2": nn.Conv2d(8, 8, 3), "c1": nn.Conv1d(8, 8, 3)}
    )


def made(library: Any, name: str, options: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    model = base()
    torch.manual_seed(3)
    state = library.get_peft_model(model, getattr(library, name)(**options)).state_dict()
    return state, torch.rand(1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_equal_seeds_give_equal_adapters(name, options):
    (theirs, after), (ours, next_one) = made(peft, name, options), made(deltatune, name, options)
    both = theirs.keys() & ours.keys()
    assert len(both) > len(base().state_dict())
    assert not [key for key in both if not torch.equal(theirs[key], ours[key])]
    if name != "VeraConfig":  # which draws with a generator of its own, PEFT once more with torch's
        assert torch.equal(after, next_one)
