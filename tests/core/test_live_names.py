"""The names by which programs know the tensors of a live model, and what they read and set on a layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

import deltatune
from deltatune.layer import AdaptedLayer
from tests.core.tiny import batch, logits, tiny
from tests.peer.pairs import scatter

PATH = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture
def model():
    made = deltatune.get_peft_model(tiny("llama"), deltatune.LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    made.add_adapter("second", deltatune.LoHaConfig(target_modules=["q_proj"]))
    return scatter(made, 3)


def layer(model):
    return model.get_submodule(PATH)


def test_the_names_are_those_of_peft(model):
    names = {name for name, _ in model.named_parameters()}
    assert {f"{PATH}.lora_A.default.weight", f"{PATH}.hada_w1_a.second", f"{PATH}.base_layer.weight"} < names
    assert "base_model.model.model.embed_tokens.lora_embedding_A.default" in names
    assert names <= set(model.state_dict())
    assert not any("adapters." in name for name in names | set(model.state_dict()))


def test_every_name_is_a_path(model):
    for name, parameter in model.named_parameters():
        assert model.get_parameter(name) is parameter


def test_each_parameter_comes_once_and_every_module_the_same_each_time(model):
    assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})
    assert [id(module) for module in model.modules()] == [id(module) for module in model.modules()]
    assert list(model.named_modules()) == list(model.named_modules())


def test_what_looks_like_a_layer_is_one(model):
    """Programs look for layers by attributes that our own adapters have as well; these are none of the modules."""
    for name in ("lora_A", "hada_w1_a", "merge", "r"):
        found = [path for path, module in model.named_modules() if hasattr(module, name)]
        assert name != "hada_w1_a" or PATH in found
        assert all(isinstance(model.get_submodule(path), AdaptedLayer) for path in found), (name, found)


def test_a_mode_set_module_by_module_reaches_the_adapters(model):
    for mode in (True, False):
        for module in model.modules():
            module.training = mode
        assert all(part.training is mode for adapter in layer(model).adapters.values() for part in adapter.modules())


def test_a_variant_is_called_as_in_peft():
    made = deltatune.get_peft_model(tiny("llama"), deltatune.LoraConfig(target_modules=["q_proj"], use_dora=True))
    names = {name for name, _ in made.named_parameters() if name.startswith(PATH)}
    own = (
        "lora_A.default.weight",
        "lora_B.default.weight",
        "lora_magnitude_vector.default.weight",
        "base_layer.weight",
    )
    assert names == {f"{PATH}.{name}" for name in own}
    assert all(made.get_parameter(name) is not None for name in names)


def test_what_has_no_name_stays_under_the_adapter():
    made = deltatune.get_peft_model(
        tiny("llama"), deltatune.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    names = {name for name, _ in made.named_buffers() if name.startswith(PATH)}
    assert names == {f"{PATH}.adapters.default.start_A", f"{PATH}.adapters.default.start_B"}
    assert made.get_buffer(f"{PATH}.adapters.default.start_A") is layer(made).adapters["default"].start_A


def test_a_state_dict_goes_back_in_under_the_same_names(model):
    state = {name: value + 1 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    assert not any(model.load_state_dict(state))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_what_is_missing_or_surplus_is_named_as_programs_know_it(model):
    state = model.state_dict()
    del state[f"{PATH}.lora_A.default.weight"], state[f"{PATH}.hada_w1_a.second"]
    state[f"{PATH}.lora_C.default.weight"] = torch.ones(1)
    found = model.load_state_dict(state, strict=False)
    assert set(found.missing_keys) == {f"{PATH}.lora_A.default.weight", f"{PATH}.hada_w1_a.second"}
    assert found.unexpected_keys == [f"{PATH}.lora_C.default.weight"]


def test_a_functional_call_uses_the_parameters_it_is_given(model):
    inputs, given = batch("llama"), {name: p.detach() * 0.5 for name, p in model.named_parameters()}
    expected = functional_call(model, given, (), inputs).logits
    model.load_state_dict(given, strict=False)
    assert torch.equal(logits(model, inputs), expected)


def test_a_parameter_set_by_its_name_is_the_adapters(model):
    value = nn.Parameter(torch.ones_like(layer(model).hada_w1_a["second"]))
    model.get_submodule(f"{PATH}.hada_w1_a").second = value
    assert layer(model).adapters["second"].hada_w1_a is value
    layer(model).lora_A["default"].weight = value = nn.Parameter(torch.ones(8, 16))
    assert layer(model).adapters["default"].lora_A.weight is value


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_clone_names_its_own_tensors(model, clone):
    dict(model.named_modules())
    other = clone(model)
    for (name, own), (same, theirs) in zip(model.named_parameters(), other.named_parameters()):
        assert name == same and own is not theirs and torch.equal(own, theirs)


def test_modules_are_the_same_each_time(model):
    assert [id(m) for m in model.modules()] == [id(m) for m in model.modules()]


def test_a_scaling_that_is_set_is_the_adapters(model):
    inputs, one = batch("llama"), layer(model)
    whole = one.get_delta_weight("default")
    one.scaling["default"] = one.scaling["default"] * 3
    assert_close(one.get_delta_weight("default"), 3 * whole)
    one.unscale_layer()
    assert_close(one.get_delta_weight("default"), whole)
    one.set_scale("default", 0.5)
    one.scale_layer(4)
    assert_close(one.get_delta_weight("default"), 2 * whole)
    one.unscale_layer(4)
    assert_close(one.get_delta_weight("default"), 0.5 * whole)
    one.set_scale("nobody", 7)
    with pytest.raises(KeyError, match="nobody"):
        one.scaling["nobody"] = 1.0
    assert logits(model, inputs).isfinite().all()


def test_one_layer_merges_and_unmerges(model):
    inputs, one = batch("llama"), layer(model)
    expected, stored = logits(model, inputs), one.base_layer.weight
    one.merge(safe_merge=True)
    assert one.merged and one.merged_adapters == ["default"] and one.base_layer.weight is not stored
    assert_close(logits(model, inputs), expected, rtol=1e-5, atol=1e-5)
    one.merge(adapter_names=["second"])
    assert one.merged_adapters == ["default", "second"]
    one.unmerge()
    assert one.base_layer.weight is stored and torch.equal(logits(model, inputs), expected)


def test_switches_of_a_layer_are_the_models(model):
    inputs = batch("llama")
    with model.disable_adapter():
        bare = logits(model, inputs)
    layer(model).enable_adapters(False)
    assert torch.equal(logits(model, inputs), bare) and layer(model).disable_adapters
    assert not layer(model).lora_A["default"].weight.requires_grad
    layer(model).enable_adapters(True)
    layer(model).set_adapter("second")
    assert model.active_adapters == ["second"]
    assert layer(model).hada_w1_a["second"].requires_grad and not layer(model).lora_A["default"].weight.requires_grad
    layer(model).delete_adapter("second")
    assert model.active_adapters == ["default"] and "second" not in layer(model).adapters


def test_a_factor_is_called_as_the_linear_layer_that_programs_take_it_for(model):
    one, x = layer(model), torch.randn(3, 16)
    update = one.scaling["default"] * one.lora_B["default"](one.lora_A["default"](x))
    assert_close(x @ one.get_delta_weight("default").T, update, rtol=1e-5, atol=1e-5)
    assert (one.lora_A["default"].in_features, one.lora_A["default"].out_features) == (16, 8)


def test_walking_from_child_to_child_gives_the_same_names(model):
    def names(module):
        inner = [f"{name}.{rest}" for name, child in module.named_children() for rest in names(child)]
        return [*inner, *module._parameters]

    assert {name for name, _ in model.named_parameters()} <= set(names(model))
    model.to(torch.float64).train()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(adapter.training for adapter in layer(model).adapters.values())


def test_a_state_dict_goes_into_a_dict_of_the_callers(model):
    mine = {}
    assert model.state_dict(destination=mine) is mine and mine.keys() == model.state_dict().keys()
