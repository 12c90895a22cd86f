"""DEFT against arXiv 2509.22793: W' = (I - P_proj) W + Q R, P_proj = Q N^T; PaRa (2406.05641) is its first half."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from deltatune import DeftConfig, get_peft_model
from deltatune.errors import ConfigError


def adapted(layer: nn.Module, scale: float = 0.4, **options):
    torch.manual_seed(0)
    config = DeftConfig(target_modules=["layer"], **{"r": 3, **options})
    model = get_peft_model(nn.ModuleDict({"layer": layer.double()}), config)
    wrapper = model.get_base_model()["layer"]
    deft = wrapper.adapters["default"]
    with torch.no_grad():
        for parameter in deft.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return wrapper, deft


def by_hand(weight: Tensor, deft, method: str, scaling: float = 1.0) -> Tensor:
    P = deft.deft_P
    if method == "qr":
        Q = torch.linalg.qr(P)[0]
        projector = P @ torch.linalg.inv(P.T @ P) @ P.T
    else:
        Q, projector = P, P @ torch.where(P > 0, P, torch.zeros_like(P)).T
    kept = (torch.eye(len(P), dtype=P.dtype) - projector) @ weight
    return kept if deft.deft_R is None else kept + scaling * Q @ deft.deft_R


@pytest.mark.parametrize("para", [False, True])
@pytest.mark.parametrize("method", ["relu", "qr"])
def test_a_subspace_is_taken_out_and_filled_anew(method, para):
    wrapper, deft = adapted(nn.Linear(7, 5), decomposition_method=method, para=para, alpha=6)
    base = wrapper.base_layer
    expected = by_hand(base.weight, deft, method, scaling=2.0)
    assert_close(wrapper.stored_weight(["default"]), expected)
    x = torch.randn(4, 7, dtype=torch.float64)
    assert_close(wrapper(x), x @ expected.T + base.bias)
    assert torch.equal(wrapper.bias, base.bias), "the subspace is taken out of W x, not of the bias"


@pytest.mark.parametrize("method", ["relu", "qr"])
def test_convolutions_and_embeddings_are_their_matrices(method):
    wrapper, deft = adapted(nn.Conv2d(2, 6, (3, 2)), decomposition_method=method)
    weight, x = wrapper.base_layer.weight, torch.randn(2, 2, 5, 4, dtype=torch.float64)
    expected = by_hand(weight.flatten(1), deft, method).reshape(weight.shape)
    assert_close(wrapper.stored_weight(["default"]), expected)
    assert_close(wrapper(x), nn.functional.conv2d(x, expected, wrapper.base_layer.bias))
    wrapper, deft = adapted(nn.Embedding(9, 5), decomposition_method=method)
    expected = by_hand(wrapper.base_layer.weight.T, deft, method)
    assert_close(wrapper.stored_weight(["default"]).T, expected)
    assert_close(wrapper(torch.tensor([[2, 8]])), expected.T[[2, 8]][None])


def test_an_orthogonal_projection_leaves_nothing_of_the_subspace():
    wrapper, deft = adapted(nn.Linear(7, 5), decomposition_method="qr", para=True)
    left = wrapper.stored_weight(["default"])
    assert_close(deft.deft_P.T @ left, torch.zeros(3, 7, dtype=torch.float64))
    assert torch.linalg.matrix_rank(left) == 2


@pytest.mark.parametrize("options", [{}, {"decomposition_method": "qr"}, {"alpha": 5}], ids=str)
def test_it_starts_with_what_it_takes_out(options):
    wrapper, deft = adapted(nn.Linear(7, 5), scale=0, **options)
    assert_close(wrapper.stored_weight(["default"]), wrapper.base_layer.weight, rtol=1e-13, atol=1e-13)
    assert deft.deft_R.abs().max() > 0


def test_other_starts_say_that_they_change_the_output():
    for options in ({"para": True}, {"init_weights": False}):
        wrapper, deft = adapted(nn.Linear(7, 5), scale=0, **options)
        assert isinstance(deft.identity_at_birth, str)
        assert not torch.allclose(wrapper.stored_weight(["default"]), wrapper.base_layer.weight)
    _, wide = adapted(nn.Linear(500, 40), scale=0, init_weights=False, init_scale=3.0)
    assert wide.deft_R.std().item() == pytest.approx(0.06, rel=0.1)
    assert wide.deft_P.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(
    "layer,options,count",
    [
        (nn.Linear(7, 5), {}, 3 * 12),
        (nn.Linear(7, 5), {"para": True}, 3 * 5),
        (nn.Linear(7, 2), {}, 2 * 9),
        (nn.Conv2d(2, 6, (3, 2)), {}, 3 * 18),
        (nn.Embedding(9, 5), {}, 3 * 14),
    ],
    ids=str,
)
def test_it_trains_r_rows_and_columns_at_most_as_many_as_outputs(layer, options, count):
    _, deft = adapted(layer, **options)
    assert sum(p.numel() for p in deft.parameters()) == count


def test_the_scale_follows_the_rank_that_is_there():
    _, deft = adapted(nn.Linear(7, 2), r=8, alpha=4)
    assert (deft.deft_r, deft.deft_scaling) == (2, 2.0)


def test_dropout_is_on_what_is_put_in_alone():
    wrapper, deft = adapted(nn.Linear(7, 5), deft_dropout=0.5)
    x = torch.randn(4, 7, dtype=torch.float64)
    deft.train()
    deft.deft_dropout.p = 1.0
    taken = x @ wrapper.base_layer.weight.T @ deft.deft_P.relu() @ deft.deft_P.T
    assert_close(wrapper(x), wrapper.base_layer(x) - taken)


def test_bad_values_are_refused():
    with pytest.raises(ConfigError, match=r"decomposition_method='svd'.*'qr'"):
        DeftConfig(decomposition_method="svd")
    with pytest.raises(ConfigError, match="alpha=0"):
        DeftConfig(alpha=0)
