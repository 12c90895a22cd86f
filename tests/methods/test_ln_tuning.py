"""LN tuning against arXiv 2312.11420: y = g' * (x - mean) / std + b' with trained g' and b', everything else frozen."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from deltatune import BitFitConfig, LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from deltatune.errors import PeftWarning, TargetError
from tests.core.tiny import batch, logits, tiny
from tests.laws.examples import Holder, move


def adapted(layer: nn.Module, shake: bool = True):
    torch.manual_seed(0)
    model = get_peft_model(Holder(layer).double().eval(), LNTuningConfig(target_modules=["layer"]))
    if shake:
        move(model)
    wrapper = model.get_base_model().layer
    return model, wrapper, wrapper.adapters["default"].ln_tuning_layers


def test_a_layer_norm_has_trained_gains_and_biases():
    _, wrapper, copy = adapted(nn.LayerNorm(6))
    x = torch.randn(4, 6, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_close(wrapper(x), normal * copy.weight + copy.bias)
    assert not torch.allclose(wrapper(x), normal, atol=0.1)


def test_an_rms_norm_has_trained_gains():
    _, wrapper, copy = adapted(LlamaRMSNorm(6, eps=1e-6))
    x = torch.randn(4, 6, dtype=torch.float32)  # it computes in float32 whatever it is given
    assert_close(wrapper(x).float(), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * copy.weight.float())
    assert copy.bias is None


LAYERS = {
    "linear": (lambda: nn.Linear(6, 6), lambda: torch.randn(3, 6)),
    "transposed": (lambda: Conv1D(6, 6), lambda: torch.randn(3, 6)),
    "transposed, rectangular": (lambda: Conv1D(4, 6), lambda: torch.randn(3, 6)),
    "embedding": (lambda: nn.Embedding(6, 6), lambda: torch.randint(6, (3, 4))),
    "convolution": (lambda: nn.Conv2d(4, 6, 2), lambda: torch.randn(2, 4, 5, 5)),
    "groups": (lambda: nn.Conv1d(4, 6, 2, groups=2), lambda: torch.randn(2, 4, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 6), lambda: torch.randn(2, 6, 5)),
    "norm over two axes": (lambda: nn.LayerNorm((3, 6)), lambda: torch.randn(2, 3, 6)),
    "transposed convolution": (lambda: nn.ConvTranspose1d(4, 6, 2), lambda: torch.randn(2, 4, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_any_layer_is_as_if_its_parameters_were_the_copies(kind):
    make, inputs = LAYERS[kind]
    model, wrapper, copy = adapted(make())
    x = inputs()
    x = x.double() if x.is_floating_point() else x
    other = make().double()
    names = {name: parameter.shape for name, parameter in other.named_parameters()}
    assert {name: parameter.shape for name, parameter in copy.named_parameters()} == names
    other.load_state_dict(copy.state_dict())
    expected = other(x)
    assert_close(wrapper(x), expected)
    assert not torch.allclose(wrapper.base_layer(x), expected, atol=1e-2)
    expected.square().sum().backward()
    model(x).square().sum().backward()
    for name, parameter in other.named_parameters():
        assert_close(dict(copy.named_parameters())[name].grad, parameter.grad)
    plain = model.merge_and_unload()
    assert torch.equal(plain.layer.weight, other.weight)
    assert_close(plain(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_starts_as_the_layer_in_its_own_precision(dtype):
    torch.manual_seed(0)
    norm = nn.LayerNorm(6, dtype=dtype)
    nn.init.normal_(norm.weight)
    model = get_peft_model(Holder(norm), LNTuningConfig(target_modules=["layer"]))
    x = torch.randn(3, 6, dtype=dtype)
    assert torch.equal(model(x), norm(x))
    copy = model.get_base_model().layer.adapters["default"].ln_tuning_layers.weight
    assert copy.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)


DEFAULTS = {"gpt2": (5, 2 * 16), "llama": (7, 16), "t5": (12, 16), "bart": (10, 2 * 16)}


@pytest.mark.parametrize("arch", DEFAULTS)
def test_the_norms_of_an_architecture_are_the_default(arch):
    model = get_peft_model(tiny(arch), LNTuningConfig())
    count, size = DEFAULTS[arch]
    assert len(model.base_model.targeted_module_names) == count
    assert model.get_nb_trainable_parameters()[0] == count * size


def test_all_norms_are_the_default_where_none_are_known():
    model = get_peft_model(tiny("bert"), LNTuningConfig())
    assert model.peft_config["default"].target_modules == {"LayerNorm"}
    assert len(model.base_model.targeted_module_names) == 1 + 2 * 2
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Sequential(nn.RMSNorm(4)))
    assert get_peft_model(net, LNTuningConfig()).peft_config["default"].target_modules == {"1", "2.0"}


def test_gradients_are_those_of_the_norms_themselves():
    inputs = batch("gpt2")
    model, plain = get_peft_model(tiny("gpt2"), LNTuningConfig()), tiny("gpt2")
    model(**inputs).loss.backward()
    plain(**inputs).loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if ".ln_" in name}
    own = model.adapter_tensors("default")
    assert len(own) == len(expected) == 10
    for key, tensor in own.items():
        name = key.removeprefix("base_model.model.").replace(".ln_tuning_layers", "")
        assert_close(tensor.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_a_module_with_parts_is_refused():
    with pytest.raises(TargetError, match="LlamaMLP"):
        get_peft_model(tiny("llama"), LNTuningConfig(target_modules=["mlp"]))
    with pytest.raises(TargetError, match="BatchNorm1d"):
        get_peft_model(Holder(nn.BatchNorm1d(4)), LNTuningConfig(target_modules=["layer"]))


def test_the_later_of_two_replaces_the_earlier_and_says_so():
    model = get_peft_model(tiny("gpt2"), LNTuningConfig())
    model.add_adapter("b", LNTuningConfig())
    move(model), move(model, name="b")
    model.set_adapter("b")
    only = logits(model, batch("gpt2"))
    with pytest.warns(PeftWarning, match=r"'b' replaces the whole weight of 'transformer.h.0.ln_1'.*'default'"):
        model.set_adapter(["default", "b"])
    assert torch.equal(logits(model, batch("gpt2")), only)


def test_it_stands_beside_other_methods(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama"), LNTuningConfig(task_type="CAUSAL_LM"))
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    move(model)
    model.set_adapter(["default", "lora"])
    both = logits(model, batch("llama"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    loaded.load_adapter(tmp_path / "lora", "lora")
    loaded.set_adapter(["default", "lora"])
    assert torch.equal(logits(loaded, batch("llama")), both)
    assert_close(logits(loaded.merge_and_unload(), batch("llama")), both, rtol=1e-4, atol=1e-4)


def test_a_bias_shift_after_it_adds_to_the_trained_bias():
    model, wrapper, copy = adapted(nn.LayerNorm(6))
    model.add_adapter("bias", BitFitConfig(target_modules=["layer"]))
    move(model, name="bias")
    model.set_adapter(["default", "bias"])
    assert_close(wrapper.bias, copy.bias + wrapper.adapters["bias"].bitfit_bias)
    x = torch.randn(3, 6, dtype=torch.float64)
    assert_close(model(x), nn.functional.layer_norm(x, (6,), copy.weight, wrapper.bias))


def test_rows_of_a_batch_have_norms_of_their_own():
    model = get_peft_model(tiny("llama"), LNTuningConfig())
    model.add_adapter("b", LNTuningConfig(target_modules=["norm"]))
    move(model), move(model, name="b")
    inputs = batch("llama", rows=3)
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=["default", "b", "__base__"]).logits
        for index, name in enumerate(["default", "b"]):
            model.set_adapter(name)
            assert_close(mixed[index], logits(model, inputs)[index], rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            assert_close(mixed[2], logits(model, inputs)[2], rtol=1e-4, atol=1e-5)


def test_it_generates():
    model = get_peft_model(tiny("llama"), LNTuningConfig())
    move(model)
    ids = torch.tensor([[7, 5, 2, 9]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(ids, **options)
    assert torch.equal(model.merge_and_unload().generate(ids, **options), found)
    assert not torch.equal(tiny("llama").generate(ids, **options), found)
