"""Starts of LoRA under its variants: the base gives way inside of what the variant makes of the weight."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import LoraConfig, PeftModel, get_peft_model
from deltatune.errors import ConfigError

GIVING_WAY = ("pissa", "olora", "pissa_niter_4")


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))


def adapted(init, **options) -> PeftModel:
    torch.manual_seed(1)
    extra = {"loftq_config": {"loftq_bits": 4}} if init == "loftq" else {}
    return get_peft_model(
        small(), LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=init, **extra, **options)
    )


def shake(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn_like(parameter))


@pytest.mark.parametrize("init", [*GIVING_WAY, "mica", "orthogonal", "eva", "loftq"])
def test_dora_sets_the_length_of_the_weight_that_gave_way(init):
    model = adapted(init, use_dora=True)
    layer = model.get_base_model()[0]
    lora, W = layer.adapters["default"], layer.base_layer.weight
    base = W if lora.stand_in is None else lora.stand_in.weight
    start = 0 if lora.start_A is None else lora.scaling * lora.start_B @ lora.start_A
    assert_close(lora.lora_magnitude_vector.weight, (base + lora.scaling * lora.B @ lora.A - start).norm(dim=1))
    shake(model)
    moved = base + lora.scaling * lora.B @ lora.A - start
    expected = lora.lora_magnitude_vector.weight[:, None] * moved / moved.norm(dim=1, keepdim=True)
    assert_close(layer.weight + 0, expected, rtol=1e-4, atol=1e-5)
    x = torch.randn(5, 12)
    assert_close(layer(x), x @ expected.T + layer.base_layer.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", GIVING_WAY)
@pytest.mark.parametrize("format", [None, "lora"])
def test_dora_from_a_start_comes_back_from_its_files(init, format, tmp_path):
    model, x = adapted(init, use_dora=True), torch.randn(5, 12)
    assert_close(model(x), small()(x))
    shake(model)
    model.save_pretrained(tmp_path, format=format)
    assert_close(PeftModel.from_pretrained(small(), tmp_path)(x), model(x))


@pytest.mark.parametrize("options", [{"velora_config": {"num_groups": 4}}, {"monteclora_config": {"num_samples": 2}}])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_variants_of_the_way_to_train_leave_the_map_as_it_is(init, options):
    model, plain, x = adapted(init, **options), adapted(init), torch.randn(5, 12)
    model.eval(), plain.eval()
    for layer, other in zip(model.get_base_model()[::2], plain.get_base_model()[::2]):
        mine, theirs = layer.adapters["default"], other.adapters["default"]
        assert torch.equal(mine.start_A, theirs.start_A)
        for name in ("lora_A", "lora_B"):
            getattr(theirs, name).weight.data.add_(0.3)
            getattr(mine, name).weight.data.copy_(getattr(theirs, name).weight)
    assert_close(model(x), plain(x))
    model.train()
    before = copy.deepcopy(model.state_dict())
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert torch.equal(model.get_base_model()[0].base_layer.weight, before["base_model.model.0.base_layer.weight"])


@pytest.mark.parametrize(
    "options", [{"use_qalora": True, "qalora_group_size": 4}, {"kasa_config": {}}, {"use_bdlora": {"nblocks": 2}}]
)
@pytest.mark.parametrize("init", ["pissa", "mica", "loftq", "eva"])
def test_variants_whose_factors_have_another_shape_or_weight_refuse_what_is_made_from_w(init, options):
    with pytest.raises(ConfigError, match="init_lora_weights"):
        adapted(init, **options)
