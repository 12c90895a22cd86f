"""OSF against arXiv 2504.07097, section 3: W = U_high S_high V_high + U_low S_low V_low, gradients off high."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import OSFConfig, get_peft_model
from deltatune.errors import ConfigError
from deltatune.factors import with_projected_gradient

SHAPES = [(9, 6), (6, 9), (7, 7)]


def adapted(layer: nn.Module, shake: bool = True, **options):
    torch.manual_seed(0)
    config = OSFConfig(**{"target_modules": ["layer"], "effective_rank": 4, **options})
    model = get_peft_model(nn.ModuleDict({"layer": layer}).double(), config)
    wrapper = model.get_base_model()["layer"]
    made = wrapper.adapters["default"]
    if shake:
        for parameter in made.parameters():
            nn.init.normal_(parameter)
    return model, wrapper, made


@pytest.mark.parametrize("out,columns", SHAPES)
def test_the_high_part_stays_and_the_low_part_is_what_trains(out, columns):
    model, wrapper, made = adapted(nn.Linear(columns, out))
    W = wrapper.base_layer.weight.detach()
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    low = made.osf_svd_params
    assert low["U_low"].shape == (out, len(S) - 4) and low["V_low"].shape == (len(S) - 4, columns)
    assert model.get_nb_trainable_parameters()[0] == (len(S) - 4) * (out + 1 + columns)
    expected = (U[:, :4] * S[:4]) @ V[:4] + low["U_low"] @ torch.diag(low["S_low"]) @ low["V_low"]
    assert_close(wrapper.as_map(["default"]).weight, expected, atol=1e-5, rtol=0)
    x = torch.randn(3, columns, dtype=torch.float64)
    assert_close(wrapper(x), x @ expected.T + wrapper.base_layer.bias, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", [nn.Linear(9, 6), nn.Conv2d(3, 6, 2), nn.Embedding(9, 6)], ids=repr)
def test_it_starts_as_the_base_to_the_bit(layer):
    _, wrapper, made = adapted(layer.float(), shake=False)
    x = torch.randint(9, (4,)) if isinstance(layer, nn.Embedding) else None
    x = torch.randn(2, 3, 4, 4).double() if isinstance(layer, nn.Conv2d) else x
    x = torch.randn(4, 9).double() if x is None else x
    assert torch.equal(wrapper(x), wrapper.base_layer(x))
    plain = wrapper.as_map().weight
    assert torch.equal(made.adapt(plain), plain)
    S = torch.linalg.svdvals(plain)
    assert_close(made.osf_svd_params["S_low"].detach(), S[4:].detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("way", ["forward", "weight"])
@pytest.mark.parametrize("out,columns", SHAPES)
def test_gradients_are_at_right_angles_to_the_high_space(out, columns, way):
    _, wrapper, made = adapted(nn.Linear(columns, out))
    W = wrapper.base_layer.weight.detach()
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    goal = torch.randn(3, out, dtype=torch.float64)
    x = torch.randn(3, columns, dtype=torch.float64)
    low = {name: tensor.detach().clone().requires_grad_() for name, tensor in made.osf_svd_params.items()}
    plain = (U[:, :4] * S[:4]) @ V[:4] + (low["U_low"] * low["S_low"]) @ low["V_low"]
    ((x @ plain.T + wrapper.base_layer.bias.detach() - goal) ** 2).sum().backward()
    found = wrapper(x) if way == "forward" else x @ wrapper.weight.T + wrapper.bias
    ((found - goal) ** 2).sum().backward()
    grads = {name: tensor.grad for name, tensor in made.osf_svd_params.items()}
    off_U = torch.eye(out, dtype=torch.float64) - U[:, :4] @ U[:, :4].T
    off_V = torch.eye(columns, dtype=torch.float64) - V[:4].T @ V[:4]
    for name, expected in (("U_low", off_U @ low["U_low"].grad), ("V_low", low["V_low"].grad @ off_V)):
        assert (grads[name] - expected).norm() < 1e-5 * expected.norm()  # the bases are in single precision
        assert (grads[name] - low[name].grad).norm() > 0.1 * expected.norm()
    assert_close(grads["S_low"], low["S_low"].grad, atol=1e-3, rtol=1e-4)


def test_a_projected_gradient_leaves_the_values():
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    basis = torch.linalg.qr(torch.randn(5, 3, dtype=torch.float64))[0]
    g = torch.randn(5, 2, dtype=torch.float64)
    for onto in (True, False):
        y = with_projected_gradient(x, basis, onto)
        assert torch.equal(y, x)
        (found,) = torch.autograd.grad(y, x, g)
        assert_close(found, basis @ basis.T @ g if onto else g - basis @ basis.T @ g)


@pytest.mark.parametrize(
    "options,rank",
    [
        ({"effective_rank": None}, 3),
        ({"effective_rank": 0.34}, 2),
        ({"effective_rank": 5}, 5),
        ({"rank_pattern": {"aye": 1}}, 1),
        ({"rank_pattern": {"none": 1, "^l": 0.5, "layer": 2}}, 3),
        ({"effective_rank": 2, "rank_pattern": {"layer$": None}}, 3),
    ],
    ids=str,
)
def test_how_many_directions_stay(options, rank):
    _, _, made = adapted(nn.Linear(6, 9), **options)
    assert made.effective_rank == rank and made.osf_svd_params["S_low"].shape == (6 - rank,)


@pytest.mark.parametrize("rank", [6, 9, 0.1, 1.0])
def test_nothing_to_keep_or_to_train_is_refused(rank):
    with pytest.raises(ConfigError, match=rf"effective_rank={rank} keeps . of the 6 .* use 1 to 5"):
        adapted(nn.Linear(6, 9), effective_rank=rank)


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, True, "half"])
def test_ranks_that_mean_nothing_are_refused_by_name(rank):
    with pytest.raises(ConfigError, match="effective_rank"):
        OSFConfig(effective_rank=rank)
    with pytest.raises(ConfigError, match="rank_pattern"):
        OSFConfig(rank_pattern={"layer": rank})


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="no regular expression"):
        OSFConfig(rank_pattern={"(": 2})


def test_a_random_start_changes_the_output():
    _, wrapper, _ = adapted(nn.Linear(6, 9), shake=False, init_weights=False)
    x = torch.randn(3, 6, dtype=torch.float64)
    assert not torch.allclose(wrapper(x), wrapper.base_layer(x))
