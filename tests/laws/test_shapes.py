"""Any leading axes, none, an empty batch; any floating dtype, and an adapter of another one than its base."""

import pytest
import torch
from torch.testing import assert_close

from deltatune import get_peft_model
from tests.laws.examples import BASES, Case, Holder, adapters, cases, move

VECTORS = ("linear", "transposed", "linear-wide-no-bias")
HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 3, 2), (0,), (2, 0)])
@pytest.mark.parametrize("case", cases(VECTORS, options=False))
def test_any_leading_axes(case: Case, leading):
    model = case.model()
    features = BASES[case.base].shape[-1]
    x = torch.randn(*leading, features)
    flat = model(x.reshape(-1, features)) if x.numel() else None
    out = model(x)
    with model.disable_adapter():
        assert out.shape == model(x).shape
    if flat is not None and model.get_base_model().layer.adapters["default"].pointwise is True:
        assert_close(out.reshape(flat.shape), flat, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("case", cases(("embedding",), options=False))
def test_any_shape_of_indices(case: Case, shape):
    model = case.model()
    x = torch.randint(16, shape)
    out = model(x)
    assert out.shape == (*shape, 8)
    if x.numel():
        assert_close(out.reshape(-1, 8), model(x.flatten()).reshape(-1, 8))


@pytest.mark.parametrize("case", cases((name for name in BASES if name.startswith("conv")), options=False))
def test_an_empty_batch_and_an_unbatched_image(case: Case):
    model = case.model()
    x = case.batch(1)
    assert model(x[:0]).shape == (0, *model(x).shape[1:])
    assert_close(model(x[0]), model(x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, *HALF])
@pytest.mark.parametrize("case", cases(options=False))
def test_the_output_has_the_dtype_of_the_base(case: Case, dtype):
    model = case.model(dtype)
    stored = {p.dtype for p in adapters(model)}
    assert stored == {torch.float64 if dtype == torch.float64 else torch.float32}
    x = case.batch(dtype=dtype)
    out = model(x)
    assert out.dtype == dtype and out.isfinite().all()
    out.float().square().mean().backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", cases())
def test_half_precision_is_close_to_single(case: Case, dtype):
    """A float32 adapter, and an adapter that follows the base, on the same weights."""
    torch.manual_seed(0)
    exact = get_peft_model(Holder(BASES[case.base].make()).to(dtype).float().eval(), case.config())
    move(exact)
    x = case.batch()
    expected = exact(x)
    for autocast in (True, False):
        torch.manual_seed(0)
        model = get_peft_model(
            Holder(BASES[case.base].make()).to(dtype).eval(), case.config(), autocast_adapter_dtype=autocast
        )
        assert {p.dtype for p in adapters(model)} == {torch.float32 if autocast else dtype}
        for ours, theirs in zip(adapters(model), adapters(exact)):
            ours.data.copy_(theirs.data)
        out = model(x.to(dtype) if x.is_floating_point() else x)
        assert out.dtype == dtype
        assert (out.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("case", cases(("linear", "transposed", "conv2d-circular"), options=False))
def test_under_autocast(case: Case):
    model = case.model()
    x = case.batch()
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
        with model.disable_adapter():
            assert out.dtype == model(x).dtype
    assert (out.float() - expected).norm() < 0.05 * expected.norm()
    out.float().square().mean().backward()


@pytest.mark.parametrize("case", cases(("linear",), options=False))
def test_moved_to_another_dtype_as_a_whole(case: Case):
    model = case.model().double()
    move(model, 0.1)
    assert model(case.batch(dtype=torch.float64)).dtype == torch.float64
