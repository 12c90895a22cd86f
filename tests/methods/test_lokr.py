"""LoKr against LyCORIS (arXiv 2309.14859, section 3.3): W' = W + (alpha / r) w1 (x) w2, w2 perhaps of rank r."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import LoKrConfig, get_peft_model
from deltatune.errors import ConfigError
from deltatune.methods.lokr import sides


def adapted(layer: nn.Module, **options):
    torch.manual_seed(0)
    model = get_peft_model(nn.ModuleDict({"layer": layer}).double(), LoKrConfig(target_modules=["layer"], **options))
    wrapper = model.get_base_model()["layer"]
    return wrapper, wrapper.adapters["default"]


def shake(adapter: nn.Module) -> None:
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)


def shapes(adapter: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix("lokr_"): tuple(p.shape) for name, p in adapter.named_parameters()}


def factors(lokr) -> tuple[torch.Tensor, torch.Tensor]:
    """w1 (l, m) and w2 (k, n) of an adapter whose w2 is no kernel."""
    w1 = lokr.lokr_w1 if lokr.lokr_w1 is not None else lokr.lokr_w1_a @ lokr.lokr_w1_b
    w2 = lokr.lokr_w2 if lokr.lokr_w2 is not None else lokr.lokr_w2_a @ lokr.lokr_w2_b
    return w1, w2


@pytest.mark.parametrize(
    "options,expected",
    [
        ({"r": 9}, {"w1": (4, 3), "w2": (5, 4)}),
        ({"r": 2}, {"w1": (4, 3), "w2_a": (5, 2), "w2_b": (2, 4)}),
        ({"r": 1, "decompose_both": True}, {"w1_a": (4, 1), "w1_b": (1, 3), "w2_a": (5, 1), "w2_b": (1, 4)}),
        ({"r": 2, "decompose_both": True}, {"w1": (4, 3), "w2_a": (5, 2), "w2_b": (2, 4)}),  # 2 is half of 4
        ({"r": 2, "decompose_factor": 2}, {"w1": (2, 2), "w2_a": (10, 2), "w2_b": (2, 6)}),
        ({"r": 50, "decompose_factor": 3}, {"w1": (2, 3), "w2": (10, 4)}),  # 3 does not divide 20
        ({"r": 1, "decompose_factor": 12}, {"w1": (4, 12), "w2_a": (5, 1), "w2_b": (1, 1)}),
    ],
    ids=str,
)
def test_every_entry_of_the_update_is_a_product_of_two_entries(options, expected):
    wrapper, lokr = adapted(nn.Linear(12, 20), alpha=3, **options)
    assert shapes(lokr) == expected
    shake(lokr)
    w1, w2 = factors(lokr)
    (k, n), W = w2.shape, wrapper.base_layer.weight.detach().clone()
    for out in range(20):
        for i in range(12):
            W[out, i] += 3 / options["r"] * w1[out // k, i // n] * w2[out % k, i % n]
    x = torch.randn(5, 12, dtype=torch.float64)
    assert_close(wrapper(x), x @ W.T + wrapper.base_layer.bias)
    assert_close(wrapper.stored_weight(["default"]), W)


def test_half_of_the_longer_side_is_enough_for_a_full_matrix():
    assert shapes(adapted(nn.Linear(16, 16), r=2)[1]) == {"w1": (4, 4), "w2": (4, 4)}
    assert shapes(adapted(nn.Linear(16, 16), r=1)[1]) == {"w1": (4, 4), "w2_a": (4, 1), "w2_b": (1, 4)}


def test_sides():
    """LyCORIS, section 3.3: near the square root, or one of them near the factor."""
    assert [sides(size, -1) for size in (1, 7, 12, 64, 768, 2304)] == [
        *((1, 1), (1, 7), (3, 4), (8, 8), (24, 32), (48, 48)),
    ]
    assert [sides(768, factor) for factor in (1, 2, 5, 32, 96, 100, 1000)] == [
        *((1, 768), (2, 384), (4, 192), (32, 24), (96, 8), (24, 32), (24, 32)),
    ]


@pytest.mark.parametrize("options", [{"r": 9}, {"r": 1}, {"r": 1, "decompose_both": True}], ids=str)
def test_on_an_embedding_each_row_moves_by_its_column(options):
    wrapper, lokr = adapted(nn.Embedding(12, 10), alpha=6, **options)
    shake(lokr)
    update = 6 / options["r"] * torch.kron(*factors(lokr))
    for index in range(12):
        assert_close(wrapper(torch.tensor([index]))[0], wrapper.base_layer.weight[index] + update[:, index])


def test_an_embedding_that_scales_its_rows_scales_the_update_too():
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    wrapper, lokr = adapted(BartScaledWordEmbedding(12, 10, 1, embed_scale=3.0), r=9)
    shake(lokr)
    ids = torch.arange(12)
    assert_close(wrapper(ids), 3 * (wrapper.base_layer.weight + lokr.update.T))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "options,expected",
    [
        ({"r": 9}, {"w2": (3, 2, 3, 2)}),
        ({"r": 1}, {"w2_a": (3, 1), "w2_b": (1, 12)}),
        ({"r": 1, "use_effective_conv2d": True}, {"w2_a": (1, 3), "w2_b": (1, 2), "t2": (1, 1, 3, 2)}),
    ],
    ids=str,
)
def test_on_a_convolution_w2_holds_the_kernel(options, expected, groups):
    wrapper, lokr = adapted(nn.Conv2d(4 * groups, 6, (3, 2), groups=groups), alpha=2, **options)
    assert shapes(lokr) == {"w1": (2, 2), **expected}
    shake(lokr)
    if options["r"] == 9:
        w2 = lokr.lokr_w2
    elif lokr.lokr_t2 is None:
        w2 = (lokr.lokr_w2_a @ lokr.lokr_w2_b).reshape(3, 2, 3, 2)
    else:
        w2 = torch.einsum("ijkl,ip,jq->pqkl", lokr.lokr_t2, lokr.lokr_w2_a, lokr.lokr_w2_b)
    kernel = wrapper.base_layer.weight.detach().clone()
    for out in range(6):
        for channel in range(4):
            kernel[out, channel] += (
                2 / options["r"] * lokr.lokr_w1[out // 3, channel // 2] * w2[out % 3, channel % 2]
            ).detach()
    x = torch.randn(2, 4 * groups, 6, 6, dtype=torch.float64)
    assert_close(wrapper(x), nn.functional.conv2d(x, kernel, wrapper.base_layer.bias, groups=groups))
    assert_close(wrapper.merged_parameters(["default"], check=True).weight.data, kernel)


def test_a_full_w2_of_a_conv1d_is_read_in_the_order_of_pefts_files():
    """A Kronecker product over (rows, columns of the kernel's first two axes) instead of over outputs and channels."""
    wrapper, lokr = adapted(nn.Conv1d(4, 6, 3), r=9, alpha=9)
    assert shapes(lokr) == {"w1": (2, 2), "w2": (3, 2, 3)}
    shake(lokr)
    change = torch.stack([torch.kron(lokr.lokr_w1, matrix) for matrix in lokr.lokr_w2])  # (3, 2 * 2, 2 * 3)
    assert_close(wrapper.stored_weight(["default"]), wrapper.base_layer.weight + change.reshape(6, 4, 3))


def test_starts():
    _, lokr = adapted(nn.Linear(768, 768), r=4)
    assert not lokr.lokr_w1.any() and lokr.lokr_w2_a.any() and lokr.lokr_w2_b.any()
    assert lokr.lokr_w2_b.abs().max() <= 1 / math.sqrt(32)
    _, lokr = adapted(nn.Linear(768, 768), r=4, decompose_both=True)
    assert not lokr.lokr_w1_a.any() and lokr.lokr_w1_b.any()
    _, lokr = adapted(nn.Linear(768, 768), r=4, init_weights="lycoris")
    assert lokr.lokr_w1.any() and lokr.lokr_w2_a.any() and not lokr.lokr_w2_b.any()
    _, lokr = adapted(nn.Linear(768, 768), r=400, init_weights="lycoris")
    assert not lokr.lokr_w2.any()
    _, lokr = adapted(nn.Linear(768, 768), r=4, init_weights=False)
    assert all(factor.any() for factor in lokr.parameters())


def test_gpt2s_joint_projection_takes_few_numbers():
    _, lokr = adapted(nn.Linear(768, 2304))
    assert sum(p.numel() for p in lokr.parameters()) == 48 * 24 + 8 * (48 + 32)


@pytest.mark.parametrize("rescale", [False, True])
def test_rank_dropout_drops_output_features_and_scales_the_rest_only_if_told_to(rescale):
    wrapper, lokr = adapted(nn.Linear(6, 400, bias=False), r=2, rank_dropout=0.25, rank_dropout_scale=rescale)
    shake(lokr)
    x = torch.randn(3, 6, dtype=torch.float64)
    whole = wrapper.eval()(x) - wrapper.base_layer(x)
    ratio = ((wrapper.train()(x) - wrapper.base_layer(x)) / whole)[0]
    kept = (ratio > 0.5).double()
    assert 0.6 < kept.mean() < 0.9
    assert_close(ratio, kept / kept.mean() if rescale else kept, rtol=1e-5, atol=1e-5)


def test_a_rank_beyond_the_layer_means_full_matrices_and_other_values_are_refused():
    wrapper, lokr = adapted(nn.Linear(12, 20), r=100_000, alpha=100_000)
    assert shapes(lokr) == {"w1": (4, 3), "w2": (5, 4)} and wrapper.scaling["default"] == 1.0
    for wrong in ({"decompose_factor": 0}, {"init_weights": "gaussian"}, {"r": -1}, {"alpha": math.inf}):
        with pytest.raises(ConfigError, match=f"LoKrConfig: {next(iter(wrong))}"):
            LoKrConfig(**wrong)
