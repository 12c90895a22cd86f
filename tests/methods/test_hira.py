"""HiRA against its paper (ICLR 2025, TwJrTz9cRS): W' = W0 + W0 * (B A), elementwise."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import HiraConfig, get_peft_model
from deltatune.errors import ConfigError


def adapted(layer: nn.Module, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = get_peft_model(nn.ModuleDict({"layer": layer}).to(dtype), HiraConfig(target_modules=["layer"], **options))
    wrapper = model.get_base_model()["layer"]
    return wrapper, wrapper.adapters["default"]


def shake(adapter: nn.Module, std: float = 0.5) -> None:
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=std)


def test_every_entry_of_the_weight_is_scaled_by_one_plus_its_entry_of_ba():
    wrapper, hira = adapted(nn.Linear(6, 4), r=3)
    shake(hira)
    W = wrapper.base_layer.weight
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = torch.empty(5, 4, dtype=torch.float64)
    for row in range(5):
        for out in range(4):
            gate = [1 + sum(hira.hira_B[out, k] * hira.hira_A[k, i] for k in range(3)) for i in range(6)]
            expected[row, out] = wrapper.base_layer.bias[out] + sum(W[out, i] * gate[i] * x[row, i] for i in range(6))
    assert_close(wrapper(x), expected)
    assert hira.hira_A.shape == (3, 6) and hira.hira_B.shape == (4, 3)


def test_the_change_has_more_than_its_factors_rank():
    wrapper, hira = adapted(nn.Linear(16, 12), r=2)
    shake(hira)
    change = wrapper.stored_weight(["default"]) - wrapper.base_layer.weight
    assert torch.linalg.matrix_rank(change) == 12 and torch.linalg.matrix_rank(hira.B @ hira.A) == 2


def test_on_an_embedding_each_row_is_scaled_by_its_column_of_a():
    wrapper, hira = adapted(nn.Embedding(9, 5), r=2)
    assert not hira.A.any() and hira.B.any(), "as PEFT: A starts at zero here"
    shake(hira)
    E, A, B = wrapper.base_layer.weight, hira.hira_embedding_A, hira.hira_embedding_B
    assert A.shape == (2, 9) and B.shape == (5, 2)
    for index in range(9):
        assert_close(wrapper(torch.tensor([index]))[0], E[index] * (1 + B @ A[:, index]))


@pytest.mark.parametrize("groups", [1, 2])
def test_on_a_convolution_the_kernel_is_scaled(groups):
    wrapper, hira = adapted(nn.Conv2d(4, 6, 3, stride=2, groups=groups), r=2)
    shake(hira)
    assert hira.hira_A.shape == (2, 4, 3, 3) and hira.hira_B.shape == (6, 2, 1, 1)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    gate = 1 + torch.einsum("or,rikl->oikl", hira.hira_B[:, :, 0, 0], hira.hira_A)
    own = gate if groups == 1 else torch.cat([gate[:3, :2], gate[3:, 2:]])  # each group reads its own channels
    kernel = wrapper.base_layer.weight * own
    expected = nn.functional.conv2d(x, kernel, wrapper.base_layer.bias, stride=2, groups=groups)
    assert_close(wrapper(x), expected)
    assert_close(wrapper.merged_parameters(["default"], check=True).weight, nn.Parameter(kernel), check_dtype=False)


@pytest.mark.parametrize(
    "layer,count",
    [(nn.Linear(6, 4), 3 * 10), (nn.Embedding(9, 5), 3 * 14), (nn.Conv2d(4, 6, (2, 3)), 3 * (4 * 6 + 6))],
)
def test_it_trains_r_times_in_plus_out(layer, count):
    _, hira = adapted(layer, r=3)
    assert sum(p.numel() for p in hira.parameters()) == count


def test_starts():
    _, hira = adapted(nn.Linear(400, 30), r=50)
    assert not hira.B.any() and hira.A.abs().max() <= 1 / 20  # kaiming_uniform with a = sqrt(5): +- 1 / sqrt(fan in)
    _, hira = adapted(nn.Linear(400, 30), r=50, init_weights="gaussian")
    assert not hira.B.any() and hira.A.std().item() == pytest.approx(1 / 50, rel=0.03)
    _, hira = adapted(nn.Linear(400, 30), r=50, init_weights=False)
    assert hira.B.std().item() == pytest.approx(1, rel=0.1) and hira.identity_at_birth is not True


def test_dropout_acts_on_the_input_of_the_change_in_training_only():
    wrapper, hira = adapted(nn.Linear(6, 4), hira_dropout=0.5, r=2)
    shake(hira)
    x = torch.randn(64, 6, dtype=torch.float64)
    wrapper.eval()
    quiet = wrapper(x)
    assert torch.equal(wrapper(x), quiet)
    wrapper.train()
    torch.manual_seed(3)
    noisy = wrapper(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    assert_close(noisy, wrapper.base_layer(x) + dropped @ (wrapper.base_layer.weight * (hira.B @ hira.A)).T)


def test_a_change_below_the_rounding_of_the_weight_is_not_lost_in_half_precision():
    wrapper, hira = adapted(nn.Linear(64, 32, bias=False), torch.bfloat16, r=2)
    shake(hira, 0.01)  # B A is about 1e-4, the steps of bfloat16 are 4e-3
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    x[0, 0] = 1.0
    change = hira.update(wrapper.base_layer.weight)[:, 0]
    W = wrapper.base_layer.weight
    assert torch.equal((W + hira.update(W)).bfloat16(), W)  # what a joint weight would do
    wrapper.base_layer.register_forward_hook(lambda module, args, out: torch.zeros_like(out))  # the change alone
    assert (wrapper(x)[0].float() - change).norm() < 0.01 * change.norm()


def test_rank_pattern_and_refusals():
    layers = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.ModuleDict({"a": nn.Linear(8, 8)})})
    model = get_peft_model(layers, HiraConfig(target_modules=["a"], r=2, rank_pattern={"b.a": 4})).get_base_model()
    assert (model["a"].adapters["default"].r, model["b"]["a"].adapters["default"].r) == (2, 4)
    for wrong in ({"r": 0}, {"hira_dropout": 1.0}, {"init_weights": "orthogonal"}, {"rank_pattern": {"a": 0}}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            HiraConfig(**wrong)
