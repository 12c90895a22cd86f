"""LoRA against arXiv 2106.09685: h = W0 x + (alpha / r) B A x, written out plainly."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import LoraConfig, get_peft_model
from deltatune.errors import ConfigError, MergeError, PeftWarning
from deltatune.kernels import low_rank


def adapted(layer: nn.Module, **options):
    torch.manual_seed(0)
    model = get_peft_model(nn.ModuleDict({"layer": layer}).double(), LoraConfig(target_modules=["layer"], **options))
    wrapper = model.get_base_model()["layer"]
    return wrapper, wrapper.adapters["default"]


def shake(adapter: nn.Module) -> None:
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_equation_of_the_paper_on_a_linear_layer(rslora):
    wrapper, lora = adapted(nn.Linear(6, 4), r=3, lora_alpha=5, use_rslora=rslora)
    shake(lora)
    W0, b, A, B = (t.detach().numpy() for t in (wrapper.base_layer.weight, wrapper.base_layer.bias, lora.A, lora.B))
    scale = 5 / math.sqrt(3) if rslora else 5 / 3
    x = np.random.default_rng(0).normal(size=(7, 6))
    h = np.stack([W0 @ row + b + scale * (B @ (A @ row)) for row in x])
    np.testing.assert_allclose(wrapper(torch.tensor(x)).detach().numpy(), h, rtol=1e-10)
    assert A.shape == (3, 6) and B.shape == (4, 3)


def test_on_an_embedding_each_row_moves_by_its_column_of_a():
    wrapper, lora = adapted(nn.Embedding(9, 5), r=2, lora_alpha=6)
    shake(lora)
    E, A, B = wrapper.base_layer.weight, lora.lora_embedding_A, lora.lora_embedding_B
    assert A.shape == (2, 9) and B.shape == (5, 2)
    for index in range(9):
        assert_close(wrapper(torch.tensor([index]))[0], E[index] + 3 * B @ A[:, index])


def test_on_a_convolution_a_is_a_convolution_of_its_own_and_b_a_pointwise_one():
    wrapper, lora = adapted(nn.Conv2d(3, 4, 3, stride=2, padding=1), r=2, lora_alpha=2)
    shake(lora)
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    down = nn.functional.conv2d(x, lora.lora_A.weight, stride=2, padding=1)
    up = nn.functional.conv2d(down, lora.lora_B.weight)
    assert lora.lora_A.weight.shape == (2, 3, 3, 3) and lora.lora_B.weight.shape == (4, 2, 1, 1)
    assert_close(wrapper(x), wrapper.base_layer(x) + up)


@pytest.mark.parametrize(
    "layer,count",
    [
        (nn.Linear(6, 4), 3 * (6 + 4)),
        (nn.Embedding(9, 5), 3 * (9 + 5)),
        (nn.Conv1d(4, 6, 5), 3 * (4 * 5 + 6)),
        (nn.Conv2d(4, 6, (2, 3)), 3 * (4 * 6 + 6)),
        (nn.Conv3d(2, 3, 2), 3 * (2 * 8 + 3)),
    ],
)
def test_it_trains_r_times_in_plus_out(layer, count):
    _, lora = adapted(layer, r=3)
    assert sum(p.numel() for p in lora.parameters()) == count


def test_with_a_bias_it_trains_out_more_and_the_bias_is_scaled_and_merged():
    wrapper, lora = adapted(nn.Linear(6, 4), r=3, lora_alpha=6, lora_bias=True)
    assert sum(p.numel() for p in lora.parameters()) == 3 * 10 + 4
    shake(lora)
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = wrapper.base_layer(x) + 2 * (x @ lora.A.T @ lora.B.T + lora.lora_B.bias)
    assert_close(wrapper(x), expected)
    merged = wrapper.merged_parameters(["default"], check=True)
    assert_close(merged.bias, wrapper.base_layer.bias + 2 * lora.lora_B.bias)
    wrapper, lora = adapted(nn.Linear(6, 4, bias=False), r=3, lora_bias=True)
    with pytest.raises(MergeError, match="without bias"):
        wrapper.merged_parameters(["default"], check=False)


def test_beside_a_start_taken_out_of_the_base_the_bias_is_scaled_in_a_pass_as_in_the_merged_layer():
    wrapper, lora = adapted(nn.Linear(6, 4), r=3, lora_alpha=6, lora_bias=True, init_lora_weights="pissa")
    shake(lora)
    x = torch.randn(5, 6, dtype=torch.float64)
    merged = wrapper.merged_parameters(["default"], check=True)
    assert_close(wrapper(x), nn.functional.linear(x, merged.weight, merged.bias))


def test_the_start_is_kaiming_uniform_for_a_and_zero_for_b():
    """kaiming_uniform with a = sqrt(5) is uniform on +- 1 / sqrt(fan in), as nn.Linear starts."""
    _, lora = adapted(nn.Linear(400, 30), r=50)
    bound = 1 / math.sqrt(400)
    assert lora.A.abs().max() <= bound and lora.A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not lora.B.any()


def test_the_gaussian_start_has_variance_one_over_r_squared():
    _, lora = adapted(nn.Linear(400, 30), r=50, init_lora_weights="gaussian")
    assert lora.A.std().item() == pytest.approx(1 / 50, rel=0.03) and abs(lora.A.mean()) < 1e-3
    assert not lora.B.any()


def test_an_embedding_starts_with_a_zero_and_b_normal():
    _, lora = adapted(nn.Embedding(300, 200), r=8)
    assert not lora.A.any() and lora.B.std().item() == pytest.approx(1, rel=0.1)


def test_a_random_start_changes_the_output():
    _wrapper, lora = adapted(nn.Linear(6, 4), r=2, init_lora_weights=False)
    assert lora.A.any() and lora.B.any()


def test_patterns_give_layers_ranks_and_alphas_of_their_own():
    layers = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.ModuleDict({"a": nn.Linear(8, 8), "ba": nn.Linear(8, 8)})})
    config = LoraConfig(
        target_modules=["a", "ba"], r=2, lora_alpha=4, rank_pattern={"b.a": 4}, alpha_pattern={r"^b\..*": 12}
    )
    model = get_peft_model(layers, config).get_base_model()
    got = {name: (m.adapters["default"].r, m.adapters["default"].scaling) for name, m in
           (("a", model["a"]), ("b.a", model["b"]["a"]), ("b.ba", model["b"]["ba"]))}  # fmt: skip
    assert got == {"a": (2, 2.0), "b.a": (4, 3.0), "b.ba": (2, 6.0)}


def test_a_pattern_that_names_nothing_is_told():
    with pytest.warns(PeftWarning, match="rank_pattern: 'elsewhere'"):
        adapted(nn.Linear(4, 4), rank_pattern={"elsewhere": 2}, r=2)


def test_dropout_acts_on_the_input_of_a_in_training_only(monkeypatch):
    monkeypatch.setattr(low_rank, "own_dropout", False)  # torch's numbers, which the equation below draws again
    wrapper, lora = adapted(nn.Linear(6, 4), lora_dropout=0.5, r=2)
    shake(lora)
    x = torch.randn(64, 6, dtype=torch.float64)
    wrapper.eval()
    quiet = wrapper(x)
    assert torch.equal(wrapper(x), quiet)
    wrapper.train()
    torch.manual_seed(3)
    noisy = wrapper(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    assert_close(noisy, wrapper.base_layer(x) + lora.scaling * dropped @ lora.A.T @ lora.B.T)
    monkeypatch.setattr(low_rank, "own_dropout", True)
    assert not torch.equal(wrapper(x), quiet) and not torch.equal(wrapper(x), wrapper(x))
    mean = torch.stack([wrapper(x).detach() for _ in range(600)]).mean(0)
    assert (mean - quiet).abs().max() < 0.2 * (noisy - quiet).abs().max()


def test_a_grouped_convolution_keeps_pefts_shapes_and_refuses_to_merge():
    wrapper, lora = adapted(nn.Conv2d(4, 6, 3, groups=2, padding=1), r=4)
    assert lora.lora_A.weight.shape == (4, 4, 3, 3) and lora.lora_B.weight.shape == (6, 2, 1, 1)
    shake(lora)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    down = nn.functional.conv2d(x, lora.lora_A.weight, padding=1)
    up = nn.functional.conv2d(down, lora.lora_B.weight, groups=2)
    assert_close(wrapper(x), wrapper.base_layer(x) + lora.scaling * up)
    with pytest.raises(MergeError, match="groups=2"):
        wrapper.merged_parameters(["default"], check=False)
    with pytest.raises(ConfigError, match=r"r=3 .*groups=2.*use r=2"):
        adapted(nn.Conv2d(4, 6, 3, groups=2), r=3)


def test_an_embedding_has_no_place_for_a_bias():
    with pytest.raises(ConfigError, match="lora_bias"):
        adapted(nn.Embedding(9, 5), r=2, lora_bias=True)


def test_an_embedding_has_no_dropout_because_it_reads_indices():
    wrapper = adapted(nn.Embedding(7, 5), r=2, lora_dropout=0.5)[0].train()
    shake(wrapper.adapters["default"])
    x = torch.tensor([[0, 3, 6]])
    assert_close(wrapper(x), nn.functional.embedding(x, wrapper.stored_weight(["default"])))
