"""LoHa against FedPara (arXiv 2108.06098) and LyCORIS (2309.14859): W' = W + (alpha / r) (A1 B1) * (A2 B2)."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import LoHaConfig, get_peft_model
from deltatune.errors import ConfigError


def adapted(layer: nn.Module, **options):
    torch.manual_seed(0)
    model = get_peft_model(nn.ModuleDict({"layer": layer}).double(), LoHaConfig(target_modules=["layer"], **options))
    wrapper = model.get_base_model()["layer"]
    return wrapper, wrapper.adapters["default"]


def shake(adapter: nn.Module) -> None:
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)


@pytest.mark.parametrize("r", [2, 5])  # through the factors, and by the matrix
def test_the_update_is_an_elementwise_product_of_two_low_rank_matrices(r):
    wrapper, loha = adapted(nn.Linear(12, 14), r=r, alpha=3)
    assert loha.through_factors == (r == 2)
    shake(loha)
    A1, B1, A2, B2 = loha.hada_w1_a, loha.hada_w1_b, loha.hada_w2_a, loha.hada_w2_b
    assert A1.shape == A2.shape == (14, r) and B1.shape == B2.shape == (r, 12)
    W = wrapper.base_layer.weight.detach().clone()
    for out in range(14):
        for i in range(12):
            first = sum(A1[out, k] * B1[k, i] for k in range(r))
            W[out, i] += 3 / r * first * sum(A2[out, k] * B2[k, i] for k in range(r))
    x = torch.randn(5, 12, dtype=torch.float64)
    assert_close(wrapper(x), x @ W.T + wrapper.base_layer.bias)
    assert_close(wrapper.stored_weight(["default"]), W)


def test_its_rank_is_up_to_r_squared():
    """FedPara, proposition 1."""
    _, loha = adapted(nn.Linear(20, 16), r=3)
    shake(loha)
    assert torch.linalg.matrix_rank(loha.update) == 9


def test_on_an_embedding_each_row_moves_by_its_column():
    wrapper, loha = adapted(nn.Embedding(9, 5), r=2, alpha=6)
    shake(loha)
    for index in range(9):
        move = 3 * (loha.hada_w1_a @ loha.hada_w1_b[:, index]) * (loha.hada_w2_a @ loha.hada_w2_b[:, index])
        assert_close(wrapper(torch.tensor([index]))[0], wrapper.base_layer.weight[index] + move)


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_on_a_convolution(groups, effective):
    wrapper, loha = adapted(nn.Conv2d(4, 6, (3, 2), groups=groups), r=2, alpha=1, use_effective_conv2d=effective)
    shake(loha)
    w1a, w1b, w2a, w2b = loha.hada_w1_a, loha.hada_w1_b, loha.hada_w2_a, loha.hada_w2_b
    own = 4 // groups  # channels that a group of outputs reads
    if effective:
        assert w1a.shape == (2, 6) and w1b.shape == (2, own) and loha.hada_t1.shape == (2, 2, 3, 2)
        cores = [
            torch.einsum("ijkl,ip,jq->pqkl", t, a, b)
            for t, a, b in ((loha.hada_t1, w1a, w1b), (loha.hada_t2, w2a, w2b))
        ]
        kernel = cores[0] * cores[1] / 2
    else:
        assert w1a.shape == (6, 2) and w1b.shape == (2, own * 6)
        kernel = ((w1a @ w1b) * (w2a @ w2b) / 2).reshape(6, own, 3, 2)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    layer = wrapper.base_layer
    assert_close(wrapper(x), nn.functional.conv2d(x, layer.weight + kernel, layer.bias, groups=groups))
    assert_close(wrapper.merged_parameters(["default"], check=True).weight.data, (layer.weight + kernel).data)


@pytest.mark.parametrize(
    "layer,options,count",
    [
        (nn.Linear(6, 4), {}, 2 * 3 * 10),
        (nn.Embedding(9, 5), {}, 2 * 3 * 14),
        (nn.Conv2d(4, 6, 3), {}, 2 * 3 * (4 * 9 + 6)),
        (nn.Conv2d(4, 6, 3), {"use_effective_conv2d": True}, 2 * (3 * (4 + 6) + 9 * 9)),
        (nn.Conv1d(4, 6, 3), {"use_effective_conv2d": True}, 2 * (3 * (4 + 6) + 9 * 3)),
        (nn.Conv2d(4, 6, 1), {"use_effective_conv2d": True}, 2 * 3 * 10),  # nothing to keep apart
    ],
)
def test_it_trains_twice_what_lora_does(layer, options, count):
    _, loha = adapted(layer, r=3, **options)
    assert sum(p.numel() for p in loha.parameters()) == count


def test_one_factor_starts_at_zero_and_the_others_uniform():
    _, loha = adapted(nn.Linear(400, 100), r=25)
    assert not loha.hada_w2_b.any() and all(f.any() for f in (loha.hada_w1_a, loha.hada_w1_b, loha.hada_w2_a))
    assert loha.hada_w1_b.abs().max() <= 1 / 20 and loha.hada_w1_a.abs().max() <= 1 / 5  # +- 1 / sqrt(fan in)
    _, loha = adapted(nn.Linear(400, 100), r=25, init_weights=False)
    assert loha.hada_w2_b.any()


def test_rank_dropout_drops_output_features_and_scales_the_rest():
    wrapper, loha = adapted(nn.Linear(6, 400, bias=False), r=2, rank_dropout=0.25)
    shake(loha)
    x = torch.randn(3, 6, dtype=torch.float64)
    wrapper.eval()
    whole = wrapper(x) - wrapper.base_layer(x)
    wrapper.train()
    ratio = (wrapper(x) - wrapper.base_layer(x)) / whole
    assert_close(ratio, ratio[:1].expand_as(ratio))  # the same features for every row
    kept = ratio[0] > 0.5
    assert 0.6 < kept.double().mean() < 0.9
    assert_close(ratio[0], kept / kept.double().mean(), rtol=1e-5, atol=1e-5)


def test_module_dropout_drops_the_whole_update():
    wrapper, loha = adapted(nn.Linear(6, 4), r=2, module_dropout=0.5)
    shake(loha)
    x = torch.randn(3, 6, dtype=torch.float64)
    dropped = [torch.equal(wrapper.train()(x), wrapper.base_layer(x)) for _ in range(60)]
    assert 15 < sum(dropped) < 45
    wrapper.eval()
    assert not any(torch.equal(wrapper(x), wrapper.base_layer(x)) for _ in range(5))


def test_patterns_and_refusals():
    layers = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.ModuleDict({"a": nn.Linear(8, 8)})})
    config = LoHaConfig(target_modules=["a"], r=2, alpha=4, rank_pattern={"b.a": 4}, alpha_pattern={"b.a": 6})
    model = get_peft_model(layers, config).get_base_model()
    found = [(layer.adapters["default"].r, layer.scaling["default"]) for layer in (model["a"], model["b"]["a"])]
    assert found == [(2, 2.0), (4, 1.5)]
    for wrong in (
        {"r": 0},
        {"alpha": 0},
        {"rank_dropout": 1.0},
        {"module_dropout": -0.1},
        {"alpha_pattern": {"a": -1}},
    ):
        with pytest.raises(ConfigError, match=f"LoHaConfig: {next(iter(wrong))}"):
            LoHaConfig(**wrong)
