"""The fused low-rank layer against the products it stands for."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

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
