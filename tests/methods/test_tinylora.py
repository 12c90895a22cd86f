"""TinyLoRA against arXiv 2602.04118: W' = W + U S^1/2 (sum_k v_k P_k) S^1/2 V^T, the r largest singular values of W."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from deltatune import PeftModel, TinyLoraConfig, get_peft_model
from deltatune.errors import ConfigError, MismatchError


class Stack(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(10, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])
        self.out = nn.Linear(6, 4)

    def forward(self, ids):
        x = self.table(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(x)


NAMES = ["table", "0", "1", "2", "3", "out"]
IDS = torch.arange(10).reshape(2, 5)


def adapted(move: bool = True, **options):
    model = get_peft_model(Stack(), TinyLoraConfig(**{"r": 2, "u": 3, "target_modules": NAMES, **options}))
    torch.manual_seed(1)
    for vector in vectors(model).values() if move else ():
        nn.init.normal_(vector)
    return model


def vectors(model):
    return dict(model.get_base_model().shared_by_adapters["default"].tinylora_v.items())


def test_it_is_the_papers_equation():
    model = adapted().double()
    base = model.get_base_model()
    for index, layer in enumerate([base.table, *base.layers, base.out]):
        own, v = layer.adapters["default"], vectors(model)[str(index)]
        table = layer.base_layer.weight
        U, S, Vt = torch.linalg.svd(table.detach())
        generator = torch.Generator().manual_seed(42 + index)
        P = torch.randn(3, 2, 2, generator=generator).double() / math.sqrt(2)
        signs = (U[:, :2] * own.tinylora_B).sum(0).sign()  # singular vectors are so up to a sign
        R = signs[:, None] * sum(v[k] * P[k] for k in range(3)) * signs
        root = torch.diag(S[:2].sqrt())
        expected = table + U[:, :2] @ root @ R @ root @ Vt[:2]
        adapted_table = layer.stored_weight(["default"])
        assert_close(adapted_table, expected, rtol=1e-5, atol=1e-6)
        if index:
            x = torch.randn(3, 6, dtype=torch.float64)
            assert_close(layer(x), x @ adapted_table.T + layer.base_layer.bias)
        else:
            assert_close(layer(IDS), adapted_table[IDS])


@pytest.mark.parametrize(
    "tying,groups", [(0.0, "012345"), (0.5, "001122"), (0.6, "000111"), (0.3, "012333"), (1.0, "000000")]
)
def test_neighbours_share_a_vector(tying, groups):
    model = adapted(weight_tying=tying)
    base = model.get_base_model()
    found = [layer.adapters["default"].group for layer in (base.table, *base.layers, base.out)]
    assert "".join(found) == groups
    assert model.get_nb_trainable_parameters()[0] == 3 * len(set(groups)) and set(vectors(model)) == set(groups)


def test_starts_and_gradients():
    model = adapted(move=False)
    assert all(vector.eq(0).all() for vector in vectors(model).values())
    with model.disable_adapter():
        expected = model(IDS)
    assert torch.equal(model(IDS), expected)
    model(IDS).square().sum().backward()
    assert all(vector.grad.abs().min() > 0 for vector in vectors(model).values())
    drawn = vectors(adapted(move=False, init_weights="uniform", init_v_bound=0.5))
    assert all(0 < vector.abs().max() <= 0.5 for vector in drawn.values())


def test_more_singular_values_than_there_are_are_cut():
    own = adapted(r=5).get_base_model().out.adapters["default"]
    assert own.r == 4 and own.tinylora_P.shape == (3, 4, 4) and own.tinylora_A.shape == (4, 6)


def test_files_are_the_vectors_and_a_changed_weight_is_noticed(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(held) == [f"base_model.tinylora_v.{index}" for index in range(6)]
    assert torch.equal(PeftModel.from_pretrained(Stack(), tmp_path)(IDS), model(IDS))
    other = Stack()
    with torch.no_grad():
        other.layers[2].weight.copy_(torch.randn(6, 6))
    with pytest.raises(MismatchError, match="another base model"):
        PeftModel.from_pretrained(other, tmp_path)
    options = {"r": 2, "u": 3, "target_modules": NAMES, "projection_seed": 7}
    with pytest.raises(MismatchError, match="tinylora_P, derived here"):
        PeftModel.from_pretrained(Stack(), tmp_path, config=TinyLoraConfig(**options))


def test_refusals():
    for options, field in (({"u": 0}, "u"), ({"weight_tying": 1.5}, "weight_tying"), ({"r": 0}, "r")):
        with pytest.raises(ConfigError) as caught:
            TinyLoraConfig(**options)
        assert caught.value.field == field
