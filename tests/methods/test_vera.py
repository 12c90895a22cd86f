"""VeRA against arXiv 2310.11454, equation (2): h = W_0 x + diag(b) B diag(d) A x, A and B one pair for all layers."""

import json
import struct

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import PeftModel, VeraConfig, get_peft_model
from deltatune.errors import ConfigError


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 4, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def adapted(move: bool = True, base: nn.Module | None = None, **options):
    torch.manual_seed(0)
    model = get_peft_model((base or Two()).double(), VeraConfig(r=5, target_modules=r"up|down|0", **options)).double()
    if move:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter))
    return model


def shared(model):
    return model.get_base_model().shared_by_adapters["default"]


def equation(layer, A, B):
    """Numbers one by one."""
    vera, (out, width) = layer.adapters["default"], layer.base_layer.weight.shape
    d, b = vera.vera_lambda_d.detach(), vera.vera_lambda_b.detach()
    delta = [[sum(b[i] * B[i, k] * d[k] * A[k, j] for k in range(len(d))) for j in range(width)] for i in range(out)]
    return layer.base_layer.weight + torch.tensor(delta, dtype=torch.float64)


def test_it_is_the_papers_equation_with_one_pair_of_projections():
    model = adapted()
    A, B = shared(model).vera_A, shared(model).vera_B
    assert A.shape == (5, 9) and B.shape == (9, 5), "the largest sides of both layers"
    up, down = model.get_base_model().up, model.get_base_model().down
    assert_close(up.stored_weight(["default"]), equation(up, A, B))
    assert_close(down.stored_weight(["default"]), equation(down, A, B))
    x = torch.randn(7, 6, dtype=torch.float64)
    hidden = torch.tanh(x @ equation(up, A, B).T + up.base_layer.bias)
    assert_close(model(x), hidden @ equation(down, A, B).T)


def test_only_the_vectors_train_and_the_projections_are_held_once():
    model = adapted()
    assert model.get_nb_trainable_parameters()[0] == (9 + 5) + (4 + 5)
    assert [name for name, _ in model.named_buffers()] == [
        f"base_model.model.shared_by_adapters.default.vera_{side}" for side in "AB"
    ]
    before = shared(model).vera_A.clone()
    model(torch.randn(7, 6, dtype=torch.float64)).square().sum().backward()
    assert torch.equal(shared(model).vera_A, before) and not shared(model).vera_A.requires_grad


def test_projections_are_kaiming_uniform_from_the_seed():
    """Section 3.2; a = 0 in Kaiming's formula: +- sqrt(6 / inputs)."""
    a, same, other = (shared(adapted(projection_prng_key=key)) for key in (3, 3, 4))
    assert torch.equal(a.vera_A, same.vera_A) and not torch.allclose(a.vera_A, other.vera_A)
    assert 0.8 * (6 / 9) ** 0.5 < a.vera_A.abs().max() <= (6 / 9) ** 0.5
    assert 0.8 * (6 / 5) ** 0.5 < a.vera_B.abs().max() <= (6 / 5) ** 0.5


def test_starts():
    vera = adapted(move=False, d_initial=0.3).get_base_model().up.adapters["default"]
    assert vera.vera_lambda_b.eq(0).all() and vera.vera_lambda_d.sub(0.3).abs().max() < 1e-7
    vera = adapted(move=False, init_weights=False).get_base_model().up.adapters["default"]
    assert vera.vera_lambda_b.eq(1).all() and vera.vera_lambda_d.std() > 0


def test_dropout_is_on_the_input_of_A():
    model = adapted(base=nn.Sequential(nn.Linear(6, 9)), vera_dropout=0.5)
    layer, x = model.get_base_model()[0], torch.ones(20000, 6, dtype=torch.float64)
    dropped, whole = model.train()(x) - layer.base_layer(x), model.eval()(x)[:1] - layer.base_layer(x[:1])
    assert_close(dropped.mean(0), whole[0], atol=0.15, rtol=0.1)
    assert len(dropped[:500].mul(1e6).round().unique(dim=0)) <= 2**6, "one pattern per subset of the inputs"


def test_a_sequential_model_still_runs_and_comes_back_whole():
    base = nn.Sequential(nn.Linear(6, 9), nn.Tanh())
    model, x = adapted(base=base), torch.randn(3, 6, dtype=torch.float64)
    assert model(x).shape == (3, 9) and len(base) == 3
    assert model.unload() is base and len(base) == 2
    merged = (model := adapted(base=base)).eval()(x)
    assert_close(model.merge_and_unload()(x), merged)
    assert len(base) == 2


def test_each_adapter_has_projections_of_its_own():
    model = adapted()
    model.add_adapter("other", VeraConfig(r=3, target_modules=["up"], projection_prng_key=9))
    held = model.get_base_model().shared_by_adapters
    assert held["other"].vera_A.shape == (3, 6) and held["default"].vera_A.shape == (5, 9)
    model.delete_adapter("other")
    assert list(held) == ["default"]


def _header(file):
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


def test_files_hold_a_checksum_of_the_projections_which_is_compared(tmp_path):
    model, x = adapted().float(), torch.randn(3, 6)
    model.save_pretrained(tmp_path)
    names = [name for name in _header(tmp_path / "adapter_model.safetensors") if name != "__metadata__"]
    assert len(names) == 4 and all("lambda" in name for name in names)

    def base():
        torch.manual_seed(0)
        return Two()

    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path)(x), model(x))
    noisy = VeraConfig(r=5, target_modules=r"up|down|0")
    loaded = PeftModel.from_pretrained(base(), tmp_path, config=noisy)
    shared(loaded).vera_A.mul_(1 + 1e-4)  # last digits of another machine
    loaded.load_adapter(tmp_path, "default")
    other = VeraConfig(r=5, target_modules=r"up|down|0", projection_prng_key=1)
    with pytest.raises(ValueError, match="vera_A, vera_B, derived here from config and base weight"):
        PeftModel.from_pretrained(base(), tmp_path, config=other)


def test_options_are_checked():
    for options, field in (({"r": 0}, "r"), ({"vera_dropout": 1.0}, "vera_dropout"), ({"bias": "some"}, "bias")):
        with pytest.raises(ConfigError) as caught:
            VeraConfig(**options)
        assert caught.value.field == field
