"""GraLoRA against arXiv 2505.20355, section 3: k x k blocks, each a LoRA of rank r / k of its own."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import GraloraConfig, get_peft_model
from deltatune.errors import ConfigError


def adapted(layer: nn.Module, **options):
    torch.manual_seed(0)
    model = get_peft_model(nn.ModuleDict({"layer": layer}).double(), GraloraConfig(target_modules=["layer"], **options))
    wrapper = model.get_base_model()["layer"]
    return wrapper, wrapper.adapters["default"]


def shake(adapter: nn.Module) -> None:
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)


def blocks(gralora, out: int, width: int) -> torch.Tensor:
    """Every block D_ji = B_ji A_ji, put together."""
    k, share = gralora.gralora_k, gralora.r // gralora.gralora_k
    update = torch.zeros(out, width, dtype=torch.float64)
    for j in range(k):
        for i in range(k):
            A = gralora.gralora_A[i][:, j * share : (j + 1) * share].T  # (r / k, in / k)
            B = gralora.gralora_B[j][i * share : (i + 1) * share].T  # (out / k, r / k)
            update[j * out // k : (j + 1) * out // k, i * width // k : (i + 1) * width // k] = (B @ A).detach()
    return update


@pytest.mark.parametrize("k,r", [(1, 2), (2, 4), (4, 4), (4, 8)])
def test_every_block_has_low_rank_factors_of_its_own(k, r):
    wrapper, gralora = adapted(nn.Linear(12, 8), r=r, gralora_k=k, alpha=3)
    assert gralora.gralora_A.shape == (k, 12 // k, r) and gralora.gralora_B.shape == (k, r, 8 // k)
    shake(gralora)
    W = wrapper.base_layer.weight + 3 / r * blocks(gralora, 8, 12)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    assert_close(wrapper(x), x @ W.T + wrapper.base_layer.bias)
    assert_close(wrapper.stored_weight(["default"]), W)


def test_its_rank_is_up_to_k_times_r():
    _, gralora = adapted(nn.Linear(24, 24), r=4, gralora_k=4)
    shake(gralora)
    assert torch.linalg.matrix_rank(blocks(gralora, 24, 24)) == 16


def test_with_hybrid_r_a_lora_of_the_whole_layer_is_added_and_the_scale_counts_both():
    wrapper, gralora = adapted(nn.Linear(12, 8), r=4, gralora_k=2, hybrid_r=3, alpha=5)
    shake(gralora)
    A, B = gralora.gralora_A_general.weight, gralora.gralora_B_general.weight
    assert A.shape == (3, 12) and B.shape == (8, 3) and wrapper.scaling["default"] == 5 / 7
    W = wrapper.base_layer.weight + 5 / 7 * (blocks(gralora, 8, 12) + B @ A)
    x = torch.randn(5, 12, dtype=torch.float64)
    assert_close(wrapper(x), x @ W.T + wrapper.base_layer.bias)
    assert_close(wrapper.stored_weight(["default"]), W)


@pytest.mark.parametrize("hybrid_r", [0, 2])
def test_on_an_embedding_each_row_moves_by_its_column(hybrid_r):
    wrapper, gralora = adapted(nn.Embedding(12, 8), r=4, alpha=8, hybrid_r=hybrid_r, gralora_dropout=0.5)
    shake(gralora)
    update = blocks(gralora, 8, 12)
    if hybrid_r:
        update = update + gralora.gralora_B_general.weight @ gralora.gralora_A_general.weight
    ids = torch.arange(12)
    assert_close(wrapper(ids), wrapper.base_layer.weight + 8 / (4 + hybrid_r) * update.T)


def test_on_a_convolution_blocks_are_those_of_channels():
    wrapper, gralora = adapted(nn.Conv2d(4, 6, 3), r=2, alpha=1)
    shake(gralora)
    kernel = wrapper.base_layer.weight + blocks(gralora, 6, 36).reshape(6, 4, 3, 3) / 2
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert_close(wrapper(x), nn.functional.conv2d(x, kernel, wrapper.base_layer.bias))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_it_trains_as_much_as_lora_whatever_k(k):
    _, gralora = adapted(nn.Linear(768, 2304), r=8, gralora_k=k)
    assert sum(p.numel() for p in gralora.parameters()) == 8 * (768 + 2304)
    _, gralora = adapted(nn.Linear(768, 2304), r=8, gralora_k=k, hybrid_r=3)
    assert sum(p.numel() for p in gralora.parameters()) == 11 * (768 + 2304)


def test_starts():
    _, gralora = adapted(nn.Linear(400, 40), r=8, gralora_k=4, hybrid_r=2)
    assert not gralora.gralora_B.any() and not gralora.gralora_B_general.weight.any()
    assert 0.099 < gralora.gralora_A.abs().max() <= 0.1  # +- 1 / sqrt(inputs of a block)
    assert 0.049 < gralora.gralora_A_general.weight.abs().max() <= 0.05
    _, gralora = adapted(nn.Linear(400, 40), r=8, gralora_k=4, hybrid_r=2, init_weights=False)
    assert gralora.gralora_B.any() and gralora.gralora_B_general.weight.any()


def test_dropout_acts_on_the_input_of_the_update_in_training_only():
    wrapper, gralora = adapted(nn.Linear(12, 8), r=4, gralora_dropout=0.5, hybrid_r=1)
    shake(gralora)
    x = torch.randn(9, 12, dtype=torch.float64)
    quiet = wrapper.eval()(x)
    assert torch.equal(wrapper(x), quiet)
    torch.manual_seed(3)
    noisy = wrapper.train()(x)
    torch.manual_seed(3)
    first, second = nn.functional.dropout(x, 0.5), nn.functional.dropout(x, 0.5)
    whole = second @ gralora.gralora_A_general.weight.T @ gralora.gralora_B_general.weight.T
    expected = wrapper.base_layer(x) + gralora.scaling * (first @ blocks(gralora, 8, 12).T + whole)
    assert_close(noisy, expected)


def test_refusals_name_the_nearest_value():
    with pytest.raises(ConfigError, match=r"r=6 .*multiple of gralora_k=4, for instance 4"):
        GraloraConfig(r=6, gralora_k=4)
    with pytest.raises(ConfigError, match=r"gralora_k=4 .*\(6, 12\); the nearest value that does is 2") as caught:
        adapted(nn.Linear(12, 6), r=4, gralora_k=4)
    assert caught.value.expected == 2
    for wrong in ({"gralora_k": 0}, {"hybrid_r": -1}, {"bias": "some"}, {"alpha": -1}, {"gralora_dropout": 1.0}):
        with pytest.raises(ConfigError, match=f"GraloraConfig: {next(iter(wrong))}"):
            GraloraConfig(**wrong)
