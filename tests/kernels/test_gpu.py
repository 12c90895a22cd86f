"""What runs on a GPU against the plain formula; Triton's kernels by its interpreter, where triton is installed."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from deltatune import LoraConfig, get_peft_model
from deltatune.errors import ConfigError
from deltatune.kernels import fused_linear, gpu

SIZES = [(1, 16, 16, 1), (5, 40, 70, 3), (33, 130, 65, 8), (0, 16, 8, 2)]


@pytest.fixture
def triton():
    """Triton's kernels, on a CPU by its interpreter, which tests/conftest.py asks for."""
    if not gpu.installed():
        pytest.skip("triton is not installed; pip install triton")
    assert torch.cuda.is_available() or gpu.interpreted()
    with gpu.using("triton"):
        yield


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(device())


def parts(T, K, N, R, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    x, W, A, B = draw(T, K, dtype=dtype), draw(N, K, dtype=dtype), draw(R, K), draw(N, R)
    return x.requires_grad_(), W, draw(N, dtype=dtype) if bias else None, A.requires_grad_(), B.requires_grad_()


def agree(T, K, N, R, dtype=torch.float32, bias=True, **bounds):
    x, W, b, A, B = parts(T, K, N, R, dtype, bias)
    g = draw(T, N, dtype=dtype)
    found, expected = (
        fused_linear.fused_linear(x, W, b, A, B),
        F.linear(x, W, b) + F.linear(F.linear(x, A.to(dtype)), B.to(dtype)),
    )
    assert found.dtype == dtype
    assert_close(found, expected, **bounds)
    for one, other in zip(*(torch.autograd.grad(y, (x, A, B), g) for y in (found, expected))):
        assert_close(one, other, **bounds)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_layer_and_update_in_torchs_products_are_the_plain_formula(sizes, bias):
    with gpu.using("fused"):
        agree(*sizes, bias=bias, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_layer_and_update_in_triton_are_the_plain_formula(triton, sizes, bias):
    agree(*sizes, bias=bias, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_triton_adds_up_in_float32(triton, dtype):
    if dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter has no products of bfloat16")
    agree(20, 64, 48, 8, dtype=dtype, rtol=2e-2, atol=1)
    x, W, b, A, B = parts(20, 64, 48, 8, dtype)
    exact = F.linear(x.double(), W.double(), b.double()) + x.double() @ A.double().T @ B.double().T
    own = (fused_linear.fused_linear(x, W, b, A, B) - exact).abs().mean()
    plain = (F.linear(x, W, b) + F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) - exact).abs().mean()
    assert own < plain  # which rounds twice


@pytest.mark.parametrize("lead", [(4,), (2, 3)])
def test_leading_axes_stay(triton, lead):
    x, W, b, A, B = parts(6, 24, 20, 4)
    x = draw(*lead, 24)
    assert_close(fused_linear.fused_linear(x, W, b, A, B), F.linear(x, W, b) + x @ A.T @ B.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("tokens", "width", "out", "rank"), [(1, 40, 70, 3), (17, 1500, 33, 8), (3, 64, 64, 20)])
def test_rows_in_triton_are_each_rows_own_update(triton, tokens, width, out, rank):
    from deltatune.kernels.triton_rows import plus_rows

    torch.manual_seed(0)
    which = torch.tensor([2, -1, 0, 2, 1], device=device())
    x, y, A, B = draw(5, tokens, width), draw(5, tokens, out), draw(3, rank, width), draw(3, out, rank)
    expected = torch.stack([
        y[row] if adapter < 0 else y[row] + x[row] @ A[adapter].T @ B[adapter].T
        for row, adapter in enumerate(which.tolist())
    ])  # fmt: skip
    before = y.clone()
    assert_close(plus_rows(y, x, A, B, which), expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(y, before)


def lora(names=("a",)):
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(24, 20), torch.nn.Linear(20, 16, bias=False)).to(device())
    config = LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.to(device()).eval()


def counted(monkeypatch, module, name):
    calls, real = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: calls.append(name) or real(*args))
    return calls


def test_a_model_with_lora_runs_through_the_chosen_form(triton, monkeypatch):
    from deltatune.kernels import triton_linear

    model, x = lora(), draw(3, 5, 24)
    calls = counted(monkeypatch, triton_linear, "linear_plus")
    found = model(x)
    assert len(calls) == 2
    found.sum().backward()
    assert len(calls) == 3  # the gradient of the inner layer's input
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    with gpu.using("plain"):
        expected = model(x)
    expected.sum().backward()
    assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert_close(gradients, [p.grad for p in model.parameters() if p.requires_grad], rtol=1e-4, atol=1e-3)
    assert len(calls) == 3


@torch.no_grad()
def test_rows_of_a_batch_run_through_the_chosen_form(triton, monkeypatch):
    from deltatune.kernels import triton_rows

    model, x, names = lora(("a", "b", "c")), draw(6, 2, 24), ["a", "b", "__base__", "c", "a", "b"]
    calls = counted(monkeypatch, triton_rows, "plus_rows")
    found = model(x, adapter_names=names)
    assert calls
    with gpu.using("plain"):
        assert_close(found, model(x, adapter_names=names), rtol=1e-4, atol=1e-3)


def test_dropout_and_other_precisions_stay_plain(triton):
    model, x = lora(), draw(2, 24)
    layer = model.get_base_model()[0]
    A, B = layer.adapters["a"].factors()
    assert fused_linear.low_rank(x, layer.as_map(), A, B, dropout=True) is None
    assert fused_linear.low_rank(x.double(), layer.as_map(), A, B, dropout=False) is None
    assert fused_linear.low_rank(x, layer.as_map(), A, B, dropout=False) is not None


def test_nothing_is_chosen_for_the_user():
    assert gpu.backend == "plain" and not gpu.on_gpu(torch.ones(1))
    with pytest.raises(ConfigError, match="cuda"), gpu.using("cuda"):
        pass
    assert gpu.backend == "plain"
