"""BitFit against arXiv 2106.10199: every weight is frozen, every bias trains."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import deltatune
from deltatune import BitFitConfig, LoraConfig, PeftModel, get_peft_model
from deltatune.errors import TargetError
from tests.core.tiny import batch, logits, tiny
from tests.laws.examples import move


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.conv = nn.Conv1d(3, 4, 2)
        self.bare = nn.Linear(4, 7, bias=False)
        self.last = nn.Linear(7, 2)

    def forward(self, x):  # (B, 3, 6) -> (B, 4, 2)
        x = self.conv(torch.tanh(self.norm(self.first(x))))
        return self.last(torch.tanh(self.bare(x)))


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Small().double().eval()


def test_it_is_the_model_with_other_biases():
    model = get_peft_model(small(), BitFitConfig())
    move(model)
    plain = small()
    with torch.no_grad():
        for name in ("first", "norm", "conv", "last"):
            adapter = model.get_base_model().get_submodule(name).adapters["default"]
            getattr(plain, name).bias.add_(adapter.bitfit_bias)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    assert_close(model(x), plain(x))
    assert not torch.allclose(model(x), small()(x), atol=1e-2)


def test_every_bias_trains_by_default_and_nothing_else():
    model = get_peft_model(small(), BitFitConfig())
    assert model.peft_config["default"].target_modules == {"first", "norm", "conv", "last"}
    assert model.get_nb_trainable_parameters()[0] == 5 + 5 + 4 + 2
    assert not any(p.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("arch", ["gpt2", "bert", "bart"])
def test_its_gradients_are_those_of_the_biases(arch):
    """All the biases of the model, whatever they are in: as training the model with its weights frozen."""
    inputs = batch(arch)
    model, plain = get_peft_model(tiny(arch), BitFitConfig()), tiny(arch)
    model(**inputs).loss.backward()
    plain(**inputs).loss.backward()
    expected = {name.removesuffix(".bias"): p.grad for name, p in plain.named_parameters() if name.endswith(".bias")}
    own = {
        key.removeprefix("base_model.model.").removesuffix(".bitfit_bias"): tensor.grad
        for key, tensor in model.adapter_tensors("default").items()
    }
    assert own.keys() == expected.keys() and len(own) > 10
    for name, grad in own.items():
        assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_layer_without_bias_is_refused_by_name_and_passed_over_by_all_linear():
    with pytest.raises(TargetError, match=r"'bare'.*no bias"):
        get_peft_model(small(), BitFitConfig(target_modules=["first", "bare"]))
    model = get_peft_model(small(), BitFitConfig(target_modules="all-linear"))
    assert list(model.base_model.targeted_module_names) == ["first", "last"]
    with pytest.raises(TargetError, match=r"all-linear.*no bias"):
        get_peft_model(tiny("llama"), BitFitConfig(target_modules="all-linear"))
    with pytest.raises(TargetError, match="target_modules"):
        get_peft_model(tiny("llama"), BitFitConfig())


def test_several_add_up_and_a_disabled_call_is_the_base():
    model = get_peft_model(small(), BitFitConfig())
    model.add_adapter("b", BitFitConfig(target_modules=["norm", "last"]))
    move(model), move(model, name="b")
    model.set_adapter(["default", "b"])
    norm = model.get_base_model().norm
    a, b = (norm.adapters[name].bitfit_bias for name in ("default", "b"))
    assert_close(norm.bias, norm.base_layer.bias + a + b)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    with model.disable_adapter():
        assert torch.equal(model(x), small()(x))


def test_merging_changes_the_biases_alone():
    model = get_peft_model(small(), BitFitConfig())
    move(model)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    expected, weight = model(x), model.get_base_model().first.base_layer.weight
    plain = model.merge_and_unload()
    assert_close(plain(x), expected)
    assert plain.first.weight is weight


def test_it_stands_beside_lora(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny("gpt2"), LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False))
    model.add_adapter("bias", BitFitConfig())
    move(model, name="bias")
    model.set_adapter(["default", "bias"])
    both = logits(model, batch("gpt2"))
    model.set_adapter("bias")
    assert not torch.allclose(logits(model, batch("gpt2")), both, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("gpt2"), tmp_path)
    loaded.load_adapter(tmp_path / "bias", "bias")
    loaded.set_adapter(["default", "bias"])
    assert_close(logits(loaded, batch("gpt2")), both)


def test_heads_of_a_task_train_whole_and_get_no_bias_of_their_own():
    model = get_peft_model(tiny("bert"), BitFitConfig(task_type="SEQ_CLS"))
    assert "classifier" not in model.base_model.targeted_module_names
    assert "classifier" not in model.peft_config["default"].target_modules


def test_deltatune_knows_its_name():
    assert deltatune.get_peft_config({"peft_type": "BITFIT"}) == BitFitConfig()
