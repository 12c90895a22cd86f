"""The optimizers take PEFT's steps: equal factors, equal gradients, several steps, equal factors again."""

import copy

import peft
import peft.optimizers.lorafa
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import deltatune
from deltatune.methods.lora import LoRA
from deltatune.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from deltatune.state_dict import ROOT

STEPS = 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(16, 12), nn.LayerNorm(12)
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(ids))
        return self.head(x + self.down(torch.tanh(self.up(x))))


def two(targets: list[str], **options):
    """The same base with the same adapter, ours and PEFT's, with factors that are both random."""
    torch.manual_seed(0)
    net = Net()
    ours = deltatune.get_peft_model(copy.deepcopy(net), deltatune.LoraConfig(target_modules=targets, **options))
    theirs = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(target_modules=targets, **options))
    tensors = {key: torch.randn_like(value) / 4 for key, value in deltatune.get_peft_model_state_dict(ours).items()}
    deltatune.set_peft_model_state_dict(ours, tensors)
    peft.set_peft_model_state_dict(theirs, tensors)
    return ours, theirs


def trained(model, optimizer, schedule: bool = False):
    generator = torch.Generator().manual_seed(1)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)) if schedule else None
    for _ in range(STEPS):
        ids = torch.randint(0, 16, (4, 6), generator=generator)
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()
        rates.step() if rates else None
    return model


def same(ours, theirs, atol: float = 1e-6):
    expected = peft.get_peft_model_state_dict(theirs)
    found = deltatune.get_peft_model_state_dict(ours)
    assert found.keys() == expected.keys()
    moved = 0
    for key, tensor in found.items():
        assert_close(tensor, expected[key], rtol=1e-5, atol=atol, msg=lambda text, key=key: f"{key}: {text}")
        moved += 1
    assert moved


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"modules_to_save": ["head"]}])
def test_loraplus_takes_the_steps_of_the_peer(kind, options):
    targets = ["up", "down"] if options else ["embed", "up", "down"]
    ours, theirs = two(targets, **options)
    asked = {"lr": 1e-3, "loraplus_lr_ratio": 8.0, "loraplus_lr_embedding": 1e-2, "loraplus_weight_decay": 0.01}
    made = create_loraplus_optimizer(ours, kind, **asked)
    other = peft.optimizers.create_loraplus_optimizer(theirs, kind, **asked)
    facts = [[(g["lr"], g["weight_decay"], len(g["params"])) for g in o.param_groups] for o in (made, other)]
    assert facts[0] == facts[1] and len(facts[0]) == 4
    same(trained(ours, made, schedule=True), trained(theirs, other, schedule=True))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"up": 6}, "alpha_pattern": {"up": 3}}])
@pytest.mark.filterwarnings("ignore:create_lorafa_optimizer")
def test_lorafa_takes_the_steps_of_the_peer(monkeypatch, options):
    # PEFT multiplies in bfloat16 wherever the machine can, which leaves three digits of the direction
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)
    ours, theirs = two(["embed", "up", "down"], r=4, lora_alpha=8, modules_to_save=["head"], **options)
    asked = {"r": 4, "lora_alpha": 8, "lr": 1e-3, "weight_decay": 0.01}
    made = create_lorafa_optimizer(ours, **asked)
    other = peft.optimizers.create_lorafa_optimizer(theirs, **asked)
    same(trained(ours, made), trained(theirs, other))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_riemannian_takes_the_steps_of_the_peer(kind):
    ours, theirs = two(["embed", "up", "down"], modules_to_save=["head"])
    asked = {"lr": 1e-3, "reg": 0.02}
    made = create_riemannian_optimizer(ours, kind, **asked)
    other = peft.optimizers.create_riemannian_optimizer(theirs, kind, **asked)
    assert isinstance(made, kind)
    same(trained(ours, made, schedule=True), trained(theirs, other, schedule=True))


def lora(model, name: str) -> LoRA:
    return model.base_model.model.get_submodule(name).adapters["default"]


def test_the_keys_of_the_comparison_are_files_keys():
    ours, _ = two(["up"])
    assert all(key.startswith(ROOT) for key in deltatune.get_peft_model_state_dict(ours))


def test_lorafa_moves_b_alone_and_by_the_least_squares_direction():
    ours, _ = two(["up"], r=4, lora_alpha=8)
    optimizer = create_lorafa_optimizer(ours, 4, 8, 1e-3)
    A, B = lora(ours, "up").lora_A.weight, lora(ours, "up").lora_B.weight
    before = A.clone()
    trained(ours, optimizer)
    assert torch.equal(A, before) and not A.requires_grad
    full = torch.randn(20, 12)  # a gradient of the whole weight: that of B is s G A^T
    B.grad = 2.0 * full @ A.detach().T
    nearest = torch.linalg.lstsq(2.0 * A.detach().T, full.T).solution.T
    assert_close(optimizer._direction(B), nearest, rtol=1e-4, atol=1e-4)


def test_riemannian_steps_do_not_depend_on_how_the_update_is_split():
    updates = []
    for split in (1.0, 3.0):
        ours, _ = two(["up"])
        with torch.no_grad():
            lora(ours, "up").lora_A.weight.mul_(split)
            lora(ours, "up").lora_B.weight.div_(split)
        adapter = lora(ours, "up")
        start = (adapter.B @ adapter.A).detach().clone()
        optimizer = create_riemannian_optimizer(ours, torch.optim.SGD, lr=1e-4, reg=1e-9)
        ours(torch.arange(16)[None]).square().sum().backward()
        optimizer.step()
        updates.append((adapter.B @ adapter.A).detach() - start)
    assert_close(*updates, rtol=2e-3, atol=1e-6)
    assert updates[0].abs().max() > 1e-4
