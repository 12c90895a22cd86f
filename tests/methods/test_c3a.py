"""C3A against arXiv 2407.19342, section 3: W' = W + C(w), C(w) block-circular; the scale 1 / in is PEFT's."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from deltatune import C3AConfig, get_peft_model
from deltatune.errors import ConfigError, PeftWarning
from deltatune.factors import circulant, correlate


def adapted(layer: nn.Module, shake: bool = True, **options):
    torch.manual_seed(0)
    model = get_peft_model(nn.ModuleDict({"layer": layer}).double(), C3AConfig(target_modules=["layer"], **options))
    wrapper = model.get_base_model()["layer"]
    c3a = wrapper.adapters["default"]
    if shake:
        nn.init.normal_(c3a.c3a_kernel)
    return wrapper, c3a


def blocks(kernel: torch.Tensor) -> torch.Tensor:
    """The matrix, entry by entry: in each block row k is the first row turned right k times."""
    m, n, b = kernel.shape
    C = torch.empty(m * b, n * b, dtype=kernel.dtype)
    for row in range(m * b):
        for column in range(n * b):
            C[row, column] = kernel[row // b, column // b, (column % b - row % b) % b]
    return C


@pytest.mark.parametrize("size", [1, 3, 4, 6])
def test_the_summand_is_block_circular_and_scaled_by_the_inputs(size):
    wrapper, c3a = adapted(nn.Linear(12 * size, 2 * size), block_size=size)
    expected = wrapper.base_layer.weight + blocks(c3a.c3a_kernel) / (12 * size)
    assert_close(wrapper.stored_weight(["default"]), expected)
    x = torch.randn(7, 12 * size, dtype=torch.float64)
    assert_close(wrapper(x), x @ expected.T + wrapper.base_layer.bias)


def test_a_product_by_fft_is_the_product():
    kernel, x = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(4, 15, dtype=torch.float64)
    assert_close(correlate(x, kernel), x @ circulant(kernel).T)
    assert_close(circulant(kernel), blocks(kernel))
    assert not torch.allclose(circulant(kernel), blocks(kernel.flip(2))), "the direction of turning matters"
    assert correlate(x[:0], kernel).shape == (0, 10)


def test_a_forward_builds_no_matrix(monkeypatch):
    wrapper, _ = adapted(nn.Linear(8, 4), block_size=4)
    monkeypatch.setattr("deltatune.methods.c3a.circulant", lambda kernel: pytest.fail("dense"))
    wrapper(torch.randn(2, 8, dtype=torch.float64)).sum().backward()


def test_conv1d_of_gpt2_is_seen_as_out_by_in():
    wrapper, c3a = adapted(Conv1D(4, 6), block_size=2)
    assert c3a.c3a_kernel.shape == (2, 3, 2)
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = x @ (wrapper.base_layer.weight + blocks(c3a.c3a_kernel).T / 6) + wrapper.base_layer.bias
    assert_close(wrapper(x), expected)


def test_an_embedding_reads_columns():
    wrapper, c3a = adapted(nn.Embedding(12, 6), block_size=3)
    ids = torch.randint(12, (4, 5))
    assert_close(wrapper(ids), (wrapper.base_layer.weight + blocks(c3a.c3a_kernel).T / 12)[ids])


def test_gpt2s_sizes_and_the_count():
    for layer, count in ((Conv1D(2304, 768), 768 * 2304 // 256), (nn.Conv2d(4, 8, 2), 16 * 8 // 4)):
        _, c3a = adapted(layer, block_size=256 if count > 99 else 4)
        assert sum(p.numel() for p in c3a.parameters()) == count


@pytest.mark.parametrize("init,bound", [("xavier_uniform", math.sqrt(6 / 96)), (False, math.sqrt(6 / 96)),
                                        ("kaiming_uniform", math.sqrt(1 / 64))])  # fmt: skip
def test_kernels_start_within_the_bounds_of_the_layers_matrix(init, bound):
    _, c3a = adapted(nn.Linear(64, 32), shake=False, block_size=4, init_weights=init)
    assert 0.95 * bound < c3a.c3a_kernel.abs().max() <= bound


def test_other_starts():
    wrapper, c3a = adapted(nn.Linear(64, 32), shake=False, block_size=4, init_weights=True)
    assert c3a.identity_at_birth is True and torch.equal(wrapper.stored_weight(["default"]), wrapper.base_layer.weight)
    _, c3a = adapted(nn.Linear(64, 32), shake=False, block_size=4, init_weights="gaussian")
    assert c3a.c3a_kernel.std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("size,near", [(5, 4), (256, 12), (7, 6)])
def test_a_size_that_does_not_divide_both_sides_is_refused_with_the_nearest(size, near):
    with pytest.raises(ConfigError, match=rf"block_size={size}.*layer \(12, 24\).* {near}"):
        adapted(nn.Linear(24, 12), block_size=size)


def test_a_size_of_its_own_for_some_layers():
    def sizes(pattern):
        net = nn.ModuleDict({"query": nn.Linear(8, 8), "value": nn.Linear(8, 8)})
        config = C3AConfig(block_size=4, target_modules=["query", "value"], block_size_pattern=pattern)
        return [layer.adapters["default"].block_size for layer in get_peft_model(net, config).get_base_model().values()]

    assert sizes({"value": 2}) == [4, 2] and sizes({"q.*": 8}) == [8, 4]
    with pytest.warns(PeftWarning, match=r"block_size_pattern.*'other'"):
        sizes({"other": 2})
    with pytest.raises(ConfigError, match="block_size_pattern"):
        sizes({"(": 2})
    with pytest.raises(ConfigError, match=r"block_size_pattern.*'value'"):
        sizes({"value": 0})


@pytest.mark.parametrize("options", [{"block_size": 0}, {"init_weights": "zeros"}, {"bias": "some"}], ids=str)
def test_refused_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        C3AConfig(**options)
