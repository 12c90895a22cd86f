"""DeLoRA against arXiv 2503.18225: rank-one terms of unit vectors, their sum bounded by lambda, scaled by |W|."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from deltatune import DeloraConfig, PeftModel, get_peft_model
from deltatune.errors import ConfigError, MismatchError


def adapted(layer: nn.Module, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = get_peft_model(nn.ModuleDict({"layer": layer}).to(dtype), DeloraConfig(target_modules=["layer"], **options))
    wrapper = model.get_base_model()["layer"]
    return wrapper, wrapper.adapters["default"]


def shake(adapter: nn.Module) -> None:
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)


@pytest.mark.parametrize("r", [1, 3])
def test_the_change_is_a_sum_of_unit_vectors(r):
    wrapper, delora = adapted(nn.Linear(6, 4), r=r, delora_lambda=2)
    shake(delora)
    bound = delora.delora_lambda
    W = wrapper.base_layer.weight
    columns = torch.stack([W[:, j].square().sum().sqrt() for j in range(6)])
    change = torch.zeros(4, 6, dtype=torch.float64)
    for i in range(r):
        a, b = delora.delora_A[i], delora.delora_B[:, i]
        change = change + bound / r * torch.outer(b / b.square().sum().sqrt(), a / a.square().sum().sqrt() * columns)
    x = torch.randn(5, 6, dtype=torch.float64)
    assert_close(wrapper(x), x @ (W + change).T + wrapper.base_layer.bias)
    assert_close(wrapper.stored_weight(["default"]), W + change)


def test_the_length_of_a_vector_does_not_matter_and_lambda_bounds_the_change():
    wrapper, delora = adapted(nn.Linear(6, 4), r=3)
    assert delora.delora_lambda.item() == 15 and delora.delora_lambda.requires_grad
    shake(delora)
    nn.init.constant_(delora.delora_lambda, 0.7)
    before = wrapper.stored_weight(["default"]).detach()
    relative = (before - wrapper.base_layer.weight) / wrapper.base_layer.weight.norm(dim=0)
    assert relative.norm() <= 0.7
    with torch.no_grad():
        delora.delora_A.mul_(5)
        delora.delora_B[:, 1].mul_(0.1)
    assert_close(wrapper.stored_weight(["default"]), before)


def test_the_gradient_turns_vectors_and_does_not_stretch_them():
    wrapper, delora = adapted(nn.Linear(6, 4), r=3)
    shake(delora)
    wrapper(torch.randn(5, 6, dtype=torch.float64)).square().sum().backward()
    A, B = delora.delora_A, delora.delora_B
    assert A.grad.abs().min() > 1e-3 and B.grad.abs().min() > 1e-3
    assert_close((A.grad * A).sum(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)
    assert_close((B.grad * B).sum(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)


def test_short_vectors_are_not_blown_up():
    wrapper, delora = adapted(nn.Linear(6, 4), r=1, delora_lambda=1)
    nn.init.constant_(delora.delora_B, 1e-6)
    change = wrapper.stored_weight(["default"]) - wrapper.base_layer.weight
    unit = delora.delora_A[0] / delora.delora_A[0].norm() * wrapper.base_layer.weight.norm(dim=0)
    assert_close(change, (1e-6 / 1e-4 * unit).expand(4, 6))


def test_the_norms_stay_those_of_the_base_weight_and_get_no_gradient():
    wrapper, delora = adapted(nn.Linear(6, 4), r=2)
    shake(delora)
    norms = delora.delora_w_norm.clone()
    wrapper.base_layer.weight.data.mul_(2)
    change = wrapper.stored_weight(["default"]) - wrapper.base_layer.weight
    wrapper.base_layer.weight.data.mul_(0.5)
    assert torch.equal(delora.delora_w_norm, norms) and not delora.delora_w_norm.requires_grad
    assert_close(change, wrapper.stored_weight(["default"]) - wrapper.base_layer.weight)


def test_on_an_embedding_and_on_a_convolution():
    for layer, shape in ((nn.Embedding(9, 5), (5, 9)), (nn.Conv2d(4, 6, 3, groups=2), (6, 36))):
        wrapper, delora = adapted(layer, r=2, module_dropout=0.5)
        wrapper.eval()
        shake(delora)
        W = wrapper.as_map().weight
        A, B = delora.delora_A, delora.delora_B
        scale = delora.delora_lambda / 2 / (A.norm(dim=1) * B.norm(dim=0))
        W = W + B @ torch.diag(scale) @ A * W.norm(dim=0)
        assert W.shape == shape
        if isinstance(layer, nn.Embedding):
            ids = torch.arange(9)
            assert_close(wrapper.train()(ids), W.T)  # no dropout of indices
        else:
            x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
            assert_close(wrapper(x), nn.functional.conv2d(x, W.reshape(6, 4, 3, 3), layer.bias))


def test_counts_and_starts():
    _, delora = adapted(nn.Linear(400, 100), r=25)
    assert sum(p.numel() for p in delora.parameters()) == 25 * 500 + 1
    assert not delora.delora_B.any() and 0.049 < delora.delora_A.abs().max() <= 0.05
    _, delora = adapted(nn.Linear(400, 100), r=25, init_weights=False)
    assert 0.19 < delora.delora_B.abs().max() <= 0.2 and delora.identity_at_birth is not True


def test_dropout_acts_on_the_input_of_the_change_in_training_only():
    wrapper, delora = adapted(nn.Linear(6, 4), module_dropout=0.5, r=2)
    shake(delora)
    x = torch.randn(64, 6, dtype=torch.float64)
    quiet = wrapper.eval()(x)
    assert torch.equal(wrapper(x), quiet)
    torch.manual_seed(3)
    noisy = wrapper.train()(x)
    torch.manual_seed(3)
    change = wrapper.stored_weight(["default"]) - wrapper.base_layer.weight
    assert_close(noisy, wrapper.base_layer(x) + nn.functional.dropout(x, 0.5) @ change.T)


def base(factor: float = 1.0) -> nn.Module:
    torch.manual_seed(1)
    layer = nn.Linear(6, 4)
    layer.weight.data.mul_(factor)
    return nn.ModuleDict({"layer": layer})


def test_files_leave_the_norms_out_check_them_and_believe_those_of_a_file(tmp_path):
    model = get_peft_model(base(), DeloraConfig(target_modules=["layer"], r=2))
    shake(model.get_base_model()["layer"].adapters["default"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.layer.delora_"
    assert set(tensors) == {key + name for name in ("A", "B", "lambda")}
    with pytest.raises(MismatchError, match="delora_w_norm"):
        PeftModel.from_pretrained(base(3.0).double(), tmp_path)  # values of another precision are not compared

    given = torch.rand(6) + 0.5
    save_file({**tensors, key + "w_norm": given}, file, metadata={"format": "pt"})
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(loaded.get_base_model()["layer"].adapters["default"].delora_w_norm, given)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(load_file(tmp_path / "again" / file.name)[key + "w_norm"], given)


def test_patterns_and_refusals():
    layers = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.ModuleDict({"a": nn.Linear(8, 8)})})
    config = DeloraConfig(target_modules=["a"], r=2, rank_pattern={"b.a": 4}, lambda_pattern={"b.a": 0.5})
    model = get_peft_model(layers, config).get_base_model()
    found = [
        (layer.adapters["default"].r, layer.delora_lambda["default"].item()) for layer in (model["a"], model["b"]["a"])
    ]
    assert found == [(2, 15.0), (4, 0.5)]
    for wrong in (
        {"r": 0},
        {"delora_lambda": 0},
        {"module_dropout": 1.0},
        {"bias": "some"},
        {"lambda_pattern": {"a": -1}},
    ):
        with pytest.raises(ConfigError, match=f"DeloraConfig: {next(iter(wrong))}"):
            DeloraConfig(**wrong)
