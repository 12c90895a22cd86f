"""The prepared way through a layer under one LoRA: taken while decoding, left whenever something else is asked for."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import LoraConfig, get_peft_model
from deltatune.adapter import Adapter


def adapted(bias=True, **options) -> Any:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5, bias=bias))
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["0"], init_lora_weights=False, **options)).eval()
    return model, model.get_submodule("base_model.model.0")


def plain(layer, x):
    """The definition, from the tensors as they are now."""
    adapter = layer.adapters["default"]
    return layer.base_layer(x) + adapter.scaling * (x @ adapter.lora_A.weight.T @ adapter.lora_B.weight.T)


@pytest.fixture
def general(monkeypatch):
    """Calls that come to an adapter by the general way."""
    seen, forward = [], type(adapted()[1].adapters["default"]).forward
    monkeypatch.setattr(
        "deltatune.methods.lora.LoRA.forward", lambda self, *args: seen.append(self) or forward(self, *args)
    )
    return seen


@torch.no_grad()
@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (4,), (2, 3), (1, 100), (0, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_after_the_first_call_it_is_taken_and_is_the_layer_plus_the_update(general, lead, bias):
    model, layer = adapted(bias)
    x = torch.randn(*lead, 6)
    for _ in range(3):
        assert_close(model(x), plain(layer, x))
    assert len(general) == 1
    if lead == (1, 1):  # a slice of longer rows, whose numbers are apart
        apart = torch.randn(1, 1, 12)[..., ::2]
        assert_close(model(apart), plain(layer, apart))
        with pytest.raises(RuntimeError):
            model(torch.randn(1, 1, 7))


def rescaled(model, layer):
    layer.scaling["default"] = 0.25


def written(model, layer):
    layer.adapters["default"].lora_A.weight.data = torch.randn(3, 6)


def another_parameter(model, layer):
    layer.adapters["default"].lora_B.weight = nn.Parameter(torch.randn(5, 3))


def another_factor(model, layer):
    layer.adapters["default"].lora_A = type(layer.adapters["default"].lora_A)(3, 6)
    nn.init.normal_(layer.adapters["default"].lora_A.weight)


def another_weight(model, layer):
    layer.base_layer.weight = nn.Parameter(torch.randn(5, 6), requires_grad=False)


def another_layer(model, layer):
    layer.base_layer = nn.Linear(6, 5)


def doubled(model, layer):
    layer.base_layer.register_forward_hook(lambda module, args, output: 2 * output)


def in_double(model, layer):
    model.double()


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [rescaled, written, another_parameter, another_factor, another_weight, another_layer, doubled, in_double],
)
@pytest.mark.parametrize("rows", [1, 4])
def test_what_is_changed_between_two_calls_counts_in_the_next(change, rows):
    model, layer = adapted()
    x = torch.randn(rows, 6)
    before = [model(x) for _ in range(2)][-1]
    change(model, layer)
    x = x.to(layer.base_layer.weight.dtype)
    assert_close(model(x), plain(layer, x))
    assert change is in_double or not torch.allclose(model(x), before)


@torch.no_grad()
def test_what_is_chosen_for_the_model_or_a_call_counts():
    model, layer = adapted()
    x = torch.randn(1, 6)
    default, base = [model(x) for _ in range(2)][-1], layer.base_layer(x)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    assert torch.equal(model(x, adapter_names=["__base__"]), base)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    assert torch.equal(model(x), default)
    model.set_adapter("other")
    other = [model(x) for _ in range(2)][-1]
    assert not torch.allclose(other, default)
    model.base_model.set_adapter(["default", "other"])
    assert_close([model(x) for _ in range(2)][-1], default + other - base)
    model.set_adapter("default")
    assert torch.equal(model(x), default)
    model.merge_adapter()
    assert torch.equal(model(x), layer.base_layer(x))
    model.unmerge_adapter()
    assert torch.equal(model(x), default)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(model(x), other)


@torch.no_grad()
@pytest.mark.parametrize("where", ["adapter", "layer"])
def test_a_hook_that_is_put_on_later_sees_the_calls(where):
    model, layer = adapted()
    x, seen = torch.randn(1, 6), []
    for _ in range(2):
        model(x)
    module = layer.adapters["default"] if where == "adapter" else layer.base_layer
    module.register_forward_hook(lambda *args: seen.append(1))
    model(x)
    assert seen == [1]


def test_gradients_autocast_vmap_and_dropout_go_the_general_way(general):
    model, layer = adapted(lora_dropout=0.5)
    x = torch.randn(1, 6)
    with torch.no_grad():
        for _ in range(2):
            model(x)
        assert len(general) == 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        assert_close(torch.vmap(model)(x[None])[0], plain(layer, x))
        model.train()
        assert any(not torch.allclose(model(x), plain(layer, x)) for _ in range(9))
        model.eval()
    model(x).sum().backward()
    assert layer.adapters["default"].lora_A.weight.grad is not None
    assert len(general) > 4


def test_an_adapter_that_prepares_nothing_goes_the_general_way_every_time(general, monkeypatch):
    monkeypatch.setattr("deltatune.methods.lora.LoRA.prepared", Adapter.prepared)
    model, layer = adapted()
    with torch.no_grad():
        for _ in range(3):
            assert_close(model(torch.ones(1, 6)), plain(layer, torch.ones(1, 6)))
    assert len(general) == 3
