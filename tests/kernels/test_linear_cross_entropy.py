"""The loss in chunks against torch's of the whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.errors import ConfigError, DataError
from deltatune.kernels.linear_cross_entropy import linear_cross_entropy

N, D, V = 13, 6, 11


def case(dtype: torch.dtype = torch.float64, bias: bool = True, trained: bool = True) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    h = torch.randn(N, D, dtype=dtype, requires_grad=True)
    W = torch.randn(V, D, dtype=dtype, requires_grad=trained)
    b = torch.randn(V, dtype=dtype, requires_grad=trained) if bias else None
    y = torch.randint(0, V, (N,))
    y[[2, 3, 12]] = -100
    return h, W, y, b  # type: ignore[return-value]


def plain(h, W, y, b, scale=1.0, softcap=None, num_items_in_batch=None, reduction="mean", **options):
    z = F.linear(h, W, b)
    z = z if z.dtype is torch.float64 else z.float()
    z = z * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if num_items_in_batch is not None:
        return F.cross_entropy(z, y, reduction="sum", **options) / num_items_in_batch
    return F.cross_entropy(z, y, reduction=reduction, **options)


OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "items": {"num_items_in_batch": 7},
    "items as a tensor": {"num_items_in_batch": torch.tensor(7)},
    "smoothed": {"label_smoothing": 0.2},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.25},
    "all": {"label_smoothing": 0.1, "softcap": 3.0, "scale": 0.5, "reduction": "sum"},
    "ignored class": {"ignore_index": 4},
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_plain_loss_with_all_gradients(options, bias):
    h, W, y, b = case(bias=bias)
    y = y.clamp(min=0) if "ignore_index" in options else y
    inputs = [t for t in (h, W, b) if t is not None]
    expected, found = plain(h, W, y, b, **options), linear_cross_entropy(h, W, y, b, chunk=4, **options)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(3 * found, inputs), torch.autograd.grad(3 * expected, inputs)):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "softcap": 2.0, "scale": 0.5}])
def test_gradcheck(options):
    h, W, y, b = case()
    assert torch.autograd.gradcheck(lambda h, W, b: linear_cross_entropy(h, W, y, b, chunk=5, **options), (h, W, b))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_precisions(dtype, tolerance):
    h, W, y, b = case(dtype)
    found, expected = linear_cross_entropy(h, W, y, b, chunk=4), plain(h, W, y, b)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # the logits are rounded alike
    for one, other in zip(torch.autograd.grad(found, (h, W, b)), torch.autograd.grad(expected, (h, W, b))):
        assert one.dtype is dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_half_precision_keeps_gradients_that_only_a_scaled_loss_can_hold():
    h, W, y, b = case(torch.float16, trained=False)
    many = 2**20  # the mean over so many is below what float16 tells from zero
    (found,) = torch.autograd.grad(2.0**16 * linear_cross_entropy(h, W, y, b, num_items_in_batch=many), [h])
    expected = torch.autograd.grad(plain(h.double(), W.double(), y, b.double(), reduction="sum"), [h])[0] * 2**-4
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-2, atol=1e-4)


def test_only_what_requires_gradients_gets_them():
    h, W, y, b = case(trained=False)
    linear_cross_entropy(h, W, y, b).backward()
    assert h.grad is not None and W.grad is None and b.grad is None
    W.requires_grad_()
    linear_cross_entropy(h.detach(), W, y, b).backward()
    assert W.grad is not None


def test_without_gradients():
    h, W, y, b = case()
    with torch.no_grad():
        found = linear_cross_entropy(h, W, y, b, chunk=4)
    assert not found.requires_grad
    torch.testing.assert_close(found, plain(h, W, y, b).detach())


def test_all_labels_ignored():
    h, W, y, b = case()
    y = torch.full_like(y, -100)
    assert linear_cross_entropy(h, W, y, b).isnan()
    total = linear_cross_entropy(h, W, y, b, reduction="sum")
    total.backward()
    assert total == 0 and torch.equal(h.grad, torch.zeros_like(h)) and torch.equal(W.grad, torch.zeros_like(W))


def test_used_twice_and_backward_twice():
    h, W, y, b = case()
    loss = linear_cross_entropy(h, W, y, b) + linear_cross_entropy(2 * h, W, y, b)
    loss.backward(retain_graph=True)
    once = h.grad.clone()
    loss.backward()
    torch.testing.assert_close(h.grad, 2 * once)
    (expected,) = torch.autograd.grad(plain(h, W, y, b) + plain(2 * h, W, y, b), [h])
    torch.testing.assert_close(once, expected)


def test_leading_axes():
    h, W, y, b = case()
    found = linear_cross_entropy(h[:12].view(3, 4, D), W, y[:12].view(3, 4), b)
    torch.testing.assert_close(found, plain(h[:12], W, y[:12], b))


def test_autocast():
    h, W, y, b = case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = linear_cross_entropy(h, W, y, b, chunk=4), plain(h, W, y, b)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for one, other in zip(torch.autograd.grad(found, (h, W, b)), torch.autograd.grad(expected, (h, W, b))):
        assert one.dtype is torch.float32
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_compiles_to_one_graph():
    h, W, y, b = case()
    compiled = torch.compile(lambda h, W, b: linear_cross_entropy(2 * h, W, y, b), fullgraph=True, backend="aot_eager")
    found, expected = compiled(h, W, b), plain(2 * h, W, y, b)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, (h, W, b)), torch.autograd.grad(expected, (h, W, b))):
        torch.testing.assert_close(one, other)


def test_operator_is_well_formed():
    h, W, y, b = case()
    op = torch.ops.deltatune.linear_cross_entropy.default
    torch.library.opcheck(op, (h, W, b, y, -100, 0.1, 0.5, 3.0, 4, [True, True, True]))
    torch.library.opcheck(op, (h, W.detach(), None, y, -100, 0.0, 1.0, None, 4, [True, False, False]))


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"chunk": 0}, {"chunk": -1}, {"softcap": 0.0}])
def test_refuses_options_that_cannot_be(options):
    h, W, y, b = case()
    (name, value) = next(iter(options.items()))
    with pytest.raises(ConfigError, match=f"{name}={value!r}") as caught:
        linear_cross_entropy(h, W, y, b, **options)
    assert isinstance(caught.value, ValueError) and caught.value.field == name and caught.value.found == value


def test_refuses_labels_that_are_not_one_for_each_row():
    """With fewer it was the loss of the first rows."""
    h, W, y, b = case()
    for labels in (y[:-1], y[..., None], y.float()):
        with pytest.raises(DataError, match="labels of shape") as caught:
            linear_cross_entropy(h, W, labels, b)
        assert caught.value.expected == tuple(h.shape[:-1])
