"""`prepare_model_for_kbit_training` on models that are quantised in different ways, and what training does then."""

import copy

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from deltatune import LoraConfig, PeftModel, get_peft_model
from deltatune.errors import PeftWarning
from deltatune.helpers import dequantize_module_weight, get_quantization_config, prepare_model_for_kbit_training
from tests.core.tiny import batch, tiny
from tests.laws.examples import move


def four_bits(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(*linear.weight.shape[::-1], linear.bias is not None, linear.weight.dtype)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def eight_bits(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(*linear.weight.shape[::-1], linear.bias is not None, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def torchao(linear: nn.Linear) -> nn.Module:
    library = pytest.importorskip("torchao.quantization")
    library.quantize_(linear, library.Int8WeightOnlyConfig())
    return linear


KINDS = {"4bit": four_bits, "8bit": eight_bits, "torchao": torchao}


def quantised(kind: str) -> nn.Module:
    model = tiny("llama", hidden_size=32, intermediate_size=64).to(torch.bfloat16)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    parent._modules[name] = KINDS[kind](child)
    model.quantization_method = "torchao" if kind == "torchao" else "bitsandbytes"
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "4bit", kind == "8bit"
    return model


def dtypes(model: nn.Module) -> dict[str, str]:
    return {name: f"{type(p).__name__} {p.dtype} {p.requires_grad}" for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tensors_are_widened_and_frozen_as_by_the_peer(kind):
    ours, theirs = quantised(kind), quantised(kind)
    assert prepare_model_for_kbit_training(ours) is ours
    peft.prepare_model_for_kbit_training(theirs)
    assert dtypes(ours) == dtypes(theirs)
    assert ours.is_gradient_checkpointing == theirs.is_gradient_checkpointing is True
    wide = ours.model.norm.weight.dtype
    assert wide == (torch.bfloat16 if kind == "torchao" else torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"use_gradient_checkpointing": False},
                                     {"gradient_checkpointing_kwargs": {"use_reentrant": True}}])  # fmt: skip
def test_adapters_learn_on_it_and_the_base_stays(kind, options):
    model = prepare_model_for_kbit_training(quantised(kind), **options)
    frozen = {name: copy.deepcopy(p.data) for name, p in model.named_parameters()}
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    model.train()
    inputs = batch("llama")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**{**inputs, "labels": inputs["input_ids"]}).loss
        loss.backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    kept = {name.replace("base_layer.", ""): p.data for name, p in model.get_base_model().named_parameters()}
    for name, before in frozen.items():
        assert torch.equal(_plain(kept[name]), _plain(before)), name


def _plain(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "qdata") else tensor


def test_gradients_are_the_same_with_and_without_recomputation():
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = prepare_model_for_kbit_training(quantised("8bit"), use_gradient_checkpointing=recompute)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
        move(model)
        model.train()
        model(**batch("llama")).logits.square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*grads):
        assert_close(one, other)


def test_adapters_that_are_there_already_go_on_training():
    model = get_peft_model(quantised("8bit"), LoraConfig(r=2, target_modules=["q_proj"]))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert isinstance(prepare_model_for_kbit_training(model), PeftModel)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained


def test_a_model_that_is_not_quantised_is_told():
    model = tiny("llama").to(torch.bfloat16)
    with pytest.warns(PeftWarning, match="is not quantised"):
        prepare_model_for_kbit_training(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_quantised_layers_are_read_as_by_the_peer(kind):
    layer = quantised(kind).model.layers[0].mlp.up_proj
    expected = peft.utils.integrations.dequantize_module_weight(copy.deepcopy(layer))
    assert_close(dequantize_module_weight(layer).float(), expected.float(), rtol=1e-5, atol=1e-6)
    plain = nn.Linear(2, 3)
    assert dequantize_module_weight(plain) is plain.weight


def test_a_quantisation_config_is_found_by_its_method():
    model = quantised("8bit")
    model.config.quantization_config = {"load_in_8bit": True}
    assert get_quantization_config(model, "bitsandbytes") == {"load_in_8bit": True}
    assert get_quantization_config(model, "gptq") is None
    assert get_quantization_config(nn.Linear(2, 2), "gptq") is None


def test_kernels_without_a_gradient_are_told_of():
    library = pytest.importorskip("torchao.quantization")
    model = tiny("llama", hidden_size=32, intermediate_size=64)
    library.quantize_(model.model.layers[0].mlp, library.Int8DynamicActivationInt8WeightConfig())
    model.quantization_method = "torchao"
    with pytest.warns(PeftWarning, match=r"3 layers \(model.layers.0.mlp.gate_proj, ...\) have a kernel without"):
        prepare_model_for_kbit_training(model)


@pytest.mark.parametrize("when", ["before", "after"])
def test_recomputed_layers_use_the_adapters_of_their_forward_pass_whenever_it_was_switched_on(when):
    """A batch of mixed rows: its choice is over when the backward pass recomputes the layers."""
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        base = tiny("llama")
        if recompute and when == "before":
            base.gradient_checkpointing_enable({"use_reentrant": False})
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
        if recompute and when == "after":
            model.gradient_checkpointing_enable()
        move(model)
        model.set_requires_grad(["default", "other"])
        model.train()
        inputs = batch("llama")
        names = (["other", "__base__"] * 4)[: len(inputs["input_ids"])]
        model(**inputs, adapter_names=names).logits.square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and all(".other." in name for name in grads[0])
    for name, gradient in grads[0].items():
        assert_close(gradient, grads[1][name])
