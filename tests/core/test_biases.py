"""Trained biases beside an adapter: `bias="all"` and `bias="lora_only"`."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import HRAConfig, LoraConfig, PeftModel, RandLoraConfig, get_peft_model, inject
from deltatune.biases import TrainedBias, WithBias
from deltatune.errors import ConfigError
from deltatune.inspect import inspect_adapter
from tests.core.tiny import batch, logits, tiny


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4, bias=False), nn.Linear(4, 3))


def adapted(choice, model=None, **options):
    config = LoraConfig(**{"r": 2, "target_modules": ["0", "2"], "bias": choice, **options})
    return moved(get_peft_model(net() if model is None else model, config))


def moved(model, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def trained(model, name="default"):
    layers = inject.adapted_layers(model.get_base_model())
    held = {path: layer.adapters[name] for path, layer in layers if name in layer.adapters}
    return [path for path, adapter in held.items() if isinstance(adapter, (TrainedBias, WithBias))]


X = torch.randn(7, 6, generator=torch.Generator().manual_seed(2))


def test_those_of_adapted_layers_or_all():
    assert trained(adapted("lora_only")) == ["0"]
    assert trained(adapted("all")) == ["0", "1", "3"]
    assert not trained(adapted("none"))


@pytest.mark.parametrize("choice", ["lora_only", "all"])
def test_the_layer_computes_with_its_trained_bias(choice):
    model = adapted(choice)
    layers = model.get_base_model()
    lora = layers[0].adapters["default"]
    assert isinstance(lora, WithBias)
    weight = layers[0].base_layer.weight + 4 * lora.lora_B.weight @ lora.lora_A.weight
    assert_close(layers[0](X), X @ weight.T + lora.trained.bias)
    assert_close(layers[0].bias, lora.trained.bias)
    if choice == "all":
        h = torch.randn(3, 5)
        assert_close(layers[1](h), nn.functional.layer_norm(h, (5,), bias=layers[1].adapters["default"].bias))


def test_disabling_and_unloading_give_back_the_base_bit_for_bit():
    model = adapted("all")
    with model.disable_adapter():
        assert torch.equal(model(X), net()(X))
    assert (model(X) - net()(X)).abs().max() > 0.1
    assert torch.equal(model.unload()(X), net()(X))


def test_each_adapter_has_its_own():
    model = adapted("all")
    one = model(X)
    model.add_adapter("other", HRAConfig(r=2, target_modules=["0"], bias="hra_only"))
    model.set_adapter("other")
    moved(model, seed=4)
    two = model(X)
    model.set_adapter("default")
    assert torch.equal(model(X), one) and not torch.equal(one, two)
    mixed = model(X[:2], adapter_names=["other", "default"])
    assert_close(mixed, torch.stack([two[0], one[1]]))


def test_merging_puts_it_into_the_layer():
    model = adapted("all")
    expected = model(X)
    assert_close(model.merge_and_unload()(X), expected)


@pytest.mark.parametrize("choice", ["lora_only", "all"])
def test_saving_and_loading(choice, tmp_path):
    model = adapted(choice)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(again(X), model(X))
    keys = set(model.adapter_tensors("default"))
    assert "base_model.model.0.base_layer.bias" in keys
    assert ("base_model.model.3.bias" in keys) == (choice == "all")


def test_a_method_of_shared_tensors_has_them_too(tmp_path):
    config = RandLoraConfig(r=2, target_modules=["0", "3"], bias="all", randlora_alpha=4)
    model = moved(get_peft_model(net(), config))
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path)(X), model(X))


def test_a_half_precision_base(tmp_path):
    model = adapted("all", net().bfloat16())
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(net().bfloat16(), tmp_path)(X.bfloat16()), model(X.bfloat16()))
    with model.disable_adapter():
        assert torch.equal(model(X.bfloat16()), net().bfloat16()(X.bfloat16()))


def test_modules_trained_whole_keep_their_own():
    model = adapted("all", modules_to_save=["3"])
    assert trained(model) == ["0", "1"]


def test_all_biases_of_a_transformer(tmp_path):
    model = adapted("all", tiny("bert"), target_modules=["query"])
    model.save_pretrained(tmp_path)
    assert inspect_adapter(tmp_path).problems == []
    count = sum(value.numel() for name, value in tiny("bert").named_parameters() if name.endswith(".bias"))
    lora = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "lora_" in n)
    assert model.get_nb_trainable_parameters()[0] == count + lora
    with model.disable_adapter():
        assert torch.equal(logits(model, batch("bert")), logits(tiny("bert"), batch("bert")))


def test_no_bias_at_all_is_said():
    with pytest.warns(UserWarning, match="no adapted layer has a bias"):
        get_peft_model(net(), LoraConfig(r=2, target_modules=["2"], bias="lora_only"))


def test_a_bias_that_cannot_be_moved_is_refused():
    base = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    with pytest.raises(ConfigError, match="the bias of 1, a BatchNorm1d"):
        get_peft_model(base, LoraConfig(r=2, target_modules=["0"], bias="all"))
    assert type(base[0]) is nn.Linear
    get_peft_model(base, LoraConfig(r=2, target_modules=["0"], bias="lora_only"))


def test_words_that_are_no_choice():
    with pytest.raises(ConfigError, match="bias='some'"):
        LoraConfig(bias="some")
