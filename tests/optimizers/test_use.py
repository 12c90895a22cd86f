"""The optimizers in use: what they refuse, what a copy of them keeps, and `deltatune train`."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from deltatune import LoraConfig, get_peft_model
from deltatune.errors import ConfigError, PeftWarning, StateError
from deltatune.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
    loraplus_groups,
)
from deltatune.train import TrainSettings, train
from tests.optimizers.test_against_peer import Net, two
from tests.train import toys


def flags(model: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


def plain() -> nn.Module:
    net = Net()
    net.requires_grad_(False)
    net.head.requires_grad_(True)
    return net


def test_a_model_without_lora_is_refused_and_left_as_it_was():
    net = plain()
    before = flags(net)
    with pytest.raises(StateError, match="no LoRA of this model trains"):
        create_lorafa_optimizer(net, 8, 8, 1e-3)
    with pytest.raises(StateError, match="no LoRA of this model trains"):
        create_riemannian_optimizer(net, torch.optim.SGD, lr=1e-3)
    with pytest.warns(PeftWarning, match="found no trained B factor"):
        groups = loraplus_groups(net, lr=1e-3, loraplus_lr_ratio=4)
    assert [len(group["params"]) for group in groups] == [1, 0, 0, 1]
    assert flags(net) == before


def test_rates_that_are_no_rates_are_refused():
    model, _ = two(["up"])
    with pytest.raises(ConfigError, match="loraplus_lr_ratio"):
        create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=0)
    with pytest.raises(ConfigError, match="lr"):
        create_lorafa_optimizer(model, 8, 8, -1.0)
    with pytest.raises(ConfigError, match="reg"):
        create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3, reg=float("nan"))


def test_weight_decay_under_the_name_that_has_no_effect_is_told():
    model, _ = two(["up"])
    with pytest.warns(PeftWarning, match="give it as loraplus_weight_decay"):
        create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4, weight_decay=0.1)


def test_an_optimizer_with_a_closure_is_refused():
    model, _ = two(["up"])
    with pytest.raises(ConfigError, match="LBFGS"):
        create_riemannian_optimizer(model, torch.optim.LBFGS, lr=1e-3)
    with pytest.raises(ConfigError, match="optimizer_cls"):
        create_riemannian_optimizer(model, dict, lr=1e-3)
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3)
    with pytest.raises(StateError, match="closure"):
        optimizer.step(lambda: torch.zeros(()))


def test_a_scaling_that_the_layers_do_not_have_is_told_and_rslora_against_the_config_refused():
    model, _ = two(["up"], r=4, lora_alpha=8)
    with pytest.warns(PeftWarning, match="theirs are used"):
        optimizer = create_lorafa_optimizer(model, 8, 8, 1e-3)
    assert set(optimizer.param_groups[0]["scaling_factors"]) == {2.0}
    with pytest.raises(ConfigError, match="use_rslora"):
        create_lorafa_optimizer(model, 4, 8, 1e-3, use_rslora=True)


def test_a_copied_lorafa_optimizer_still_knows_its_pairs():
    model, _ = two(["up"], r=4, lora_alpha=8)
    optimizer = create_lorafa_optimizer(model, 4, 8, 1e-3)
    twin, made = copy.deepcopy((model, optimizer))
    for each, stepper in ((model, optimizer), (twin, made)):
        each(torch.arange(16)[None]).square().sum().backward()
        stepper.step()
    for one, other in zip(model.parameters(), twin.parameters()):
        assert_close(one, other, rtol=0, atol=0)


def test_lorafa_adapts_a_convolution_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5 * 4, 2))
    model = get_peft_model(net, LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    layer = model.get_base_model()[0].adapters["default"]
    nn.init.normal_(layer.lora_B.weight)
    before = layer.lora_B.weight.detach().clone()
    optimizer = create_lorafa_optimizer(model, 2, 2, 1e-2)
    model(torch.randn(4, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    assert (layer.lora_B.weight - before).abs().max() > 1e-3


@pytest.mark.parametrize("optimizer", ["loraplus", "lorafa", "riemannian"])
def test_train_takes_them_and_resumes_to_the_same_bits(optimizer, tmp_path):
    base = toys.llama(tmp_path / "base")
    rows = toys.write_jsonl(tmp_path / "rows.jsonl", toys.pairs(24))
    common = {
        "model_name_or_path": str(base),
        "task": "causal",
        "train_file": str(rows),
        "learning_rate": 1e-3,
        "device": "cpu",
        "num_threads": 1,
        "num_samples": 0,
        "num_scored": 0,
        "eval_before": False,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "save_steps": 2,
    }

    def tensors(name: str) -> dict[str, torch.Tensor]:
        return load_file(tmp_path / name / "adapter_model.safetensors")

    train(TrainSettings(**common, optimizer=optimizer, output_dir=str(tmp_path / "one")))
    train(TrainSettings(**common, output_dir=str(tmp_path / "adamw")))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (last,) = (tmp_path / "two").rglob("*checkpoint-4")
    shutil.rmtree(last)
    train(TrainSettings(**common, optimizer=optimizer, output_dir=str(tmp_path / "two"), resume_from_checkpoint=True))
    one, two_, other = tensors("one"), tensors("two"), tensors("adamw")
    assert all(torch.equal(one[key], two_[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_train_refuses_them_for_other_methods():
    with pytest.raises(ConfigError, match="optimizer='lorafa'"):
        TrainSettings(method="ia3", optimizer="lorafa")
    with pytest.raises(ConfigError, match="optimizer='riemannian'"):
        TrainSettings(method="full", optimizer="riemannian")
