"""HRA against arXiv 2405.17484, equation (3): W' = W H_1 H_2 ... H_r, H_i = I - 2 u_i u_i^T / ||u_i||^2."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import HRAConfig, get_peft_model
from deltatune.errors import ConfigError


def adapted(layer: nn.Module, shake: bool = True, **options):
    torch.manual_seed(0)
    model = get_peft_model(nn.ModuleDict({"layer": layer}).double(), HRAConfig(target_modules=["layer"], **options))
    wrapper = model.get_base_model()["layer"]
    hra = wrapper.adapters["default"]
    if shake:
        nn.init.normal_(hra.hra_u)
    return wrapper, hra


def chain(columns: torch.Tensor) -> torch.Tensor:
    """H_1 H_2 ... H_r, multiplied out."""
    product = torch.eye(len(columns), dtype=columns.dtype)
    for u in columns.T:
        product = product @ (torch.eye(len(columns), dtype=columns.dtype) - 2 * torch.outer(u, u) / (u @ u))
    return product


@pytest.mark.parametrize("r", [1, 3, 4])
def test_the_weight_is_reflected_r_times_in_order(r):
    wrapper, hra = adapted(nn.Linear(8, 5), r=r)
    H = chain(hra.hra_u)
    assert_close(wrapper.stored_weight(["default"]), wrapper.base_layer.weight @ H)
    x = torch.randn(7, 8, dtype=torch.float64)
    assert_close(wrapper(x), x @ (wrapper.base_layer.weight @ H).T + wrapper.base_layer.bias)
    if r > 1:
        assert not torch.allclose(H, chain(hra.hra_u.flip(1))), "the order of reflections matters"


@pytest.mark.parametrize("r", [1, 2, 5])
def test_the_chain_is_orthogonal_with_determinant_minus_one_to_the_r(r):
    _, hra = adapted(nn.Linear(8, 5), r=r)
    H = hra.adapt(torch.eye(8, dtype=torch.float64))
    assert_close(H @ H.T, torch.eye(8, dtype=torch.float64))
    assert torch.linalg.det(H).item() == pytest.approx((-1) ** r)


def test_it_trains_in_times_r():
    for layer, count in ((nn.Linear(8, 5), 8 * 4), (nn.Conv2d(3, 5, 2), 12 * 4)):
        _, hra = adapted(layer, r=4)
        assert sum(p.numel() for p in hra.parameters()) == count


def test_an_even_chain_starts_with_equal_neighbours_that_cancel():
    """Section 3.1: u_1 = u_2, u_3 = u_4, ..."""
    wrapper, hra = adapted(nn.Linear(8, 5), shake=False, r=4)
    u = hra.hra_u
    assert torch.equal(u[:, 0], u[:, 1]) and torch.equal(u[:, 2], u[:, 3]) and not torch.equal(u[:, 0], u[:, 2])
    assert_close(wrapper.stored_weight(["default"]), wrapper.base_layer.weight)
    assert u.abs().max() <= 1 / math.sqrt(2)  # kaiming_uniform with a = sqrt(5): +- 1 / sqrt(number of columns drawn)


def test_an_odd_chain_starts_as_a_reflection():
    wrapper, _hra = adapted(nn.Linear(8, 5), shake=False, r=3)
    assert not torch.allclose(wrapper.stored_weight(["default"]), wrapper.base_layer.weight)


def test_gram_schmidt_makes_the_vectors_orthonormal_in_order():
    _, hra = adapted(nn.Linear(8, 5), r=3, apply_GS=True)
    q, triangle = torch.linalg.qr(hra.hra_u)
    q = q * triangle.diagonal().sign()
    assert_close(hra.U, q)
    assert_close(hra.adapt(torch.eye(8, dtype=torch.float64)), torch.eye(8, dtype=torch.float64) - 2 * q @ q.T)


def test_more_orthonormal_vectors_than_inputs_are_refused():
    with pytest.raises(ConfigError, match="r=6"):
        adapted(nn.Linear(5, 9), r=6, apply_GS=True)


def test_the_length_of_a_vector_does_not_matter():
    wrapper, hra = adapted(nn.Linear(8, 5), r=2)
    before = wrapper.stored_weight(["default"]).detach()
    with torch.no_grad():
        hra.hra_u.mul_(3.0)
    assert_close(wrapper.stored_weight(["default"]), before)
