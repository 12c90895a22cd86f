"""Uni-LoRA against arXiv 2506.00799: theta_D = P theta_d, one n_j^-1/2 per row of P, so that P^T P = I."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from deltatune import PeftModel, UniLoraConfig, get_peft_model
from deltatune.errors import ConfigError, MismatchError


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 4, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def adapted(**options):
    options = {"r": 2, "theta_d_length": 11, "target_modules": ["up", "down"], **options}
    return get_peft_model(Two(), UniLoraConfig(**options)).double()


def own(model):
    return [getattr(model.get_base_model(), name).adapters["default"] for name in ("up", "down")]


def theta(model):
    return model.get_base_model().shared_by_adapters["default"].unilora_theta_d


def projection(model):
    """P, from the places of all A and B in order."""
    places = torch.cat([getattr(part, f"unilora_indices_{side}").flatten() for part in own(model) for side in "AB"])
    P = torch.zeros(len(places), len(theta(model)), dtype=torch.float64)
    for row, place in enumerate(places.tolist()):
        P[row, place] = places.eq(place).sum().double() ** -0.5
    return P


def test_it_is_the_papers_equation():
    model = adapted()
    numbers = iter((projection(model) @ theta(model)).split([12, 18, 18, 8]))
    for name in ("up", "down"):
        layer = getattr(model.get_base_model(), name)
        A, B = next(numbers).reshape(2, -1), next(numbers).reshape(-1, 2)
        assert_close(layer.stored_weight(["default"]), layer.base_layer.weight + B @ A, rtol=1e-6, atol=1e-7)
        x = torch.randn(5, A.shape[1], dtype=torch.float64)
        assert_close(layer(x), layer.base_layer(x) + x @ A.T @ B.T, rtol=1e-6, atol=1e-7)


def test_the_projection_keeps_lengths_and_uses_all_numbers_alike():
    model = adapted()
    P = projection(model)
    assert_close(P.T @ P, torch.eye(11, dtype=torch.float64))
    counts = P.ne(0).sum(0)
    assert counts.sum() == 56 and set(counts.tolist()) == {5, 6}


def test_counts_and_starts():
    model = adapted()
    assert model.get_nb_trainable_parameters()[0] == 11 and theta(model).abs().max() <= 0.02
    assert theta(adapted(init_weights=False)).abs().max() > 0.1
    model(torch.randn(5, 6, dtype=torch.float64)).square().sum().backward()
    assert theta(model).grad.abs().min() > 0


def test_more_numbers_than_places_leave_some_unused():
    model = adapted(theta_d_length=100)
    assert projection(model).sum(0).ne(0).sum() == 56
    assert model.get_base_model().shared_by_adapters["default"].unilora_scales.eq(1).all()


def test_the_file_is_the_vector_unless_the_places_are_asked_for(tmp_path):
    model, x = adapted().float(), torch.randn(3, 6)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    assert list(load_file(file)) == ["base_model.unilora_theta_d"]
    assert torch.equal(PeftModel.from_pretrained(Two(), tmp_path)(x), model(x))
    other = UniLoraConfig(r=2, theta_d_length=11, target_modules=["up", "down"], proj_seed=1)
    with pytest.raises(MismatchError, match="unilora_indices_A"):
        PeftModel.from_pretrained(Two(), tmp_path, config=other)
    kept = adapted(save_indices=True).float()
    kept.save_pretrained(tmp_path / "kept")
    (length,) = struct.unpack("<Q", (tmp_path / "kept" / "adapter_model.safetensors").read_bytes()[:8])
    header = json.loads((tmp_path / "kept" / "adapter_model.safetensors").read_bytes()[8 : 8 + length])
    assert "derived" not in json.loads(header["__metadata__"]["deltatune"])
    assert len(load_file(tmp_path / "kept" / "adapter_model.safetensors")) == 1 + 2 * 4
    assert torch.equal(PeftModel.from_pretrained(Two(), tmp_path / "kept")(x), kept(x))


def test_refusals():
    for options, field in (({"theta_d_length": 0}, "theta_d_length"), ({"proj_seed": -1}, "proj_seed")):
        with pytest.raises(ConfigError) as caught:
            UniLoraConfig(**options)
        assert caught.value.field == field
