"""Compacter against arXiv 2106.04647, section 4: W = sum_i A_i (x) (s_i t_i^T), the A_i common to all layers."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import CompacterConfig, PeftModel, get_peft_model
from deltatune.errors import ConfigError
from tests.core.tiny import batch, logits, tiny
from tests.laws.examples import move


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def adapted(moved: bool = True, **options):
    torch.manual_seed(0)
    config = CompacterConfig(target_modules=["up", "down"], **{"phm_dim": 2, "reduction_factor": 2, **options})
    model = get_peft_model(Two(), config).double()
    if moved:
        move(model, 0.7)
    return model


def rules(model) -> torch.Tensor:
    return model.get_base_model().shared_by_adapters["default"].compacter_A


def W(part, A) -> torch.Tensor:
    """Kronecker products, one by one."""
    return sum(torch.kron(A[i], part.s[i] @ part.t[i]) for i in range(len(A)))


@pytest.mark.parametrize("rank", [1, 3])
def test_it_is_a_bottleneck_of_hypercomplex_layers_with_common_rules(rank):
    model = adapted(phm_rank=rank, non_linearity="tanh", scaling=0.5)
    base, A = model.get_base_model(), rules(model)

    def layer(wrapper, x):
        h, part = wrapper.base_layer(x), wrapper.adapters["default"]
        D, U = W(part.compacter_down, A), W(part.compacter_up, A)
        assert D.shape == U.T.shape == (wrapper.base_layer.out_features // 2, wrapper.base_layer.out_features)
        return h + 0.5 * (torch.tanh(h @ D.T + part.compacter_down.bias) @ U.T + part.compacter_up.bias)

    x = torch.randn(5, 6, dtype=torch.float64)
    assert_close(model(x), layer(base.down, torch.tanh(layer(base.up, x))))


def test_so_many_numbers_train_and_the_rules_once():
    """A layer of width d and bottleneck m: (d + m) rank for each of two matrices, m + d biases; n^3 for all."""
    model = adapted(phm_rank=3)
    each = {d: 2 * 3 * (d + d // 2) + d + d // 2 for d in (12, 4)}
    assert model.get_nb_trainable_parameters()[0] == sum(each.values()) + 2**3
    assert [name for name in model.adapter_tensors("default") if name.endswith("compacter_A")] == [
        "base_model.compacter_A"
    ]
    model(torch.randn(5, 6, dtype=torch.float64)).square().sum().backward()
    assert rules(model).grad.abs().min() > 0


def test_a_fresh_one_changes_nothing_and_narrows_by_as_much_as_a_linear_layer_would():
    model, x = adapted(moved=False), torch.randn(5, 6, dtype=torch.float64)
    with model.disable_adapter():
        expected = model(x)
    assert torch.equal(model(x), expected)
    wide = get_peft_model(nn.ModuleDict({"up": nn.Linear(4, 512)}), CompacterConfig(target_modules=["up"], phm_rank=4))
    down = wide.get_base_model()["up"].adapters["default"].compacter_down
    assert down.matrix(rules(wide)).std().item() == pytest.approx((3 * 512) ** -0.5, rel=0.5)
    assert not torch.allclose(adapted(moved=False, init_weights=False)(x), expected)


@pytest.mark.parametrize("factor,size", [(2, 6), (4, 2), (100, 2), (1, 12)])
def test_the_width_is_a_multiple_of_n(factor, size):
    part = adapted(reduction_factor=factor).get_base_model().up.adapters["default"]
    assert len(part.compacter_down.bias) == size


def test_a_side_that_n_does_not_divide_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"phm_dim=5 does not divide the 12 outputs of up; .* is 4"):
        adapted(phm_dim=5)


@pytest.mark.parametrize("arch", ["gpt2", "bert", "t5"])
def test_the_usual_layers_and_the_file(arch, tmp_path):
    model, inputs = get_peft_model(tiny(arch), CompacterConfig()).eval(), batch(arch)
    move(model, 0.3)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(arch), tmp_path), inputs), expected)
    with model.disable_adapter():
        assert not torch.allclose(logits(model, inputs), expected, atol=1e-3)
