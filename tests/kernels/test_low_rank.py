"""The fused low-rank layer against the products it stands for."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.testing import assert_close

from deltatune import LoraConfig, get_peft_model
from deltatune.kernels import low_rank
from deltatune.kernels.low_rank import low_rank_linear


def parts(*lead, bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, grad=True):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_(grad)

    return draw(*lead, 6), draw(5, 6, grad=False), draw(5, grad=False) if bias else None, draw(3, 6), draw(5, 3)


@pytest.mark.parametrize("lead", [(), (4,), (2, 4), (0, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_layer_plus_the_two_products(lead, bias):
    x, W, b, A, B = parts(*lead, bias=bias)
    g = torch.randn(*lead, 5, dtype=torch.float64)
    found, expected = low_rank_linear(x, W, b, A, B), F.linear(x, W, b) + F.linear(F.linear(x, A), B)
    assert_close(found, expected)
    of_found, of_expected = (torch.autograd.grad(y, (x, A, B), g) for y in (found, expected))
    assert_close(of_found, of_expected)


@torch.no_grad()
@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (2,), (2, 3), (0, 1)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5, dtype=torch.float64)])
def test_without_gradients_too_for_one_token_and_for_more(lead, bias, scale):
    x, W, b, A, B = parts(*lead, bias=bias)
    expected = F.linear(x, W, b) + 0.5 * F.linear(F.linear(x, A), B)
    assert_close(low_rank_linear(x, W, b, A, B, scale=scale), expected)
    if x.ndim > 1:  # as a slice of longer rows, which is not contiguous
        wide = torch.cat([x, x], dim=-1)[..., :6]
        assert_close(low_rank_linear(wide, W, b, A, B, scale=scale), expected)


def test_the_gradient_of_a_weight_that_trains_too_is_right():
    inputs = [tensor.detach().requires_grad_() for tensor in parts(4) if tensor is not None]
    torch.autograd.gradcheck(low_rank_linear, inputs)


def test_dropout_drops_a_share_keeps_the_mean_and_draws_the_same_mask_for_the_gradient():
    x, A, B = torch.ones(400, 500, requires_grad=True), torch.eye(500).requires_grad_(), torch.eye(500)
    W = torch.zeros(500, 500)
    y = low_rank_linear(x, W, None, A, B, dropout=0.25)
    kept = y != 0
    assert abs(kept.float().mean() - 0.75) < 0.005 and abs(kept.float().mean(0) - 0.75).max() < 0.15
    assert_close(y[kept], torch.full_like(y[kept], 1 / 0.75), rtol=1e-4, atol=0)
    of_x, of_A = torch.autograd.grad(y.sum(), (x, A))
    assert_close(of_x, y.detach())
    assert_close(of_A.diagonal(), y.detach().sum(0), rtol=1e-4, atol=1e-2)
    assert not torch.equal(low_rank_linear(x, W, None, A, B, dropout=0.25), y)


def test_the_mask_follows_torchs_generator():
    x, W, b, A, B = parts(4)
    torch.manual_seed(3)
    first = low_rank_linear(x, W, b, A, B, dropout=0.5)
    torch.manual_seed(3)
    assert torch.equal(low_rank_linear(x, W, b, A, B, dropout=0.5), first)


def test_in_half_precision_only_the_input_is_kept():
    x, W, b, A, B = parts(64, dtype=torch.bfloat16)
    A, B = A.detach().float().requires_grad_(), B.detach().float().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = low_rank_linear(x, W, b, A, B)
    assert y.dtype == torch.bfloat16
    assert [tuple(tensor.shape) for tensor in saved if len(tensor) == 64] == [(64, 6)]
    of_A, of_B = torch.autograd.grad(y.float().square().sum(), (A, B))
    assert of_A.dtype == of_B.dtype == torch.float32


def test_gradients_of_gradients_see_the_same_mask():
    """As a penalty on gradients takes them; bits of integers, which the mask is, have no gradient."""
    x, W, b, A, B = parts(4)

    def both(layer):
        torch.manual_seed(3)
        inner = torch.autograd.grad(layer().pow(2).sum(), (x, A, B), create_graph=True)
        return [*inner, *torch.autograd.grad(sum(part.pow(2).sum() for part in inner), (x, A, B))]

    torch.manual_seed(3)
    mask = low_rank._mask(x, 0.5, int(torch.randint(2**62, ()))) != 0
    found = both(lambda: low_rank_linear(x, W, b, A, B, dropout=0.5))
    assert_close(found, both(lambda: F.linear(x, W, b) + F.linear(F.linear(2 * mask * x, A), B)))


@pytest.mark.parametrize("train", [True, False])
def test_forward_derivatives_are_those_of_the_layer(train):
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), LoraConfig(target_modules=["0"], r=3))
    model.train(train).base_model.model[0].lora_B["default"].weight.data.normal_()
    x, t = torch.randn(4, 6), torch.randn(4, 6)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, t))).tangent
    assert_close(found, F.linear(t, model.base_model.model[0].weight + 0), rtol=1e-5, atol=1e-5)


def test_nearly_everything_may_be_dropped():
    x, W, b, A, B = parts(4)
    assert low_rank_linear(x, W, b, A, B, dropout=0.99999).isfinite().all()
