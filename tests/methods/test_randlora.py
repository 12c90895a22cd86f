"""RandLoRA against arXiv 2502.00987, equation (3): W' = W + (alpha / r) sum_j B_j L_j A G_j, L_j and G_j diagonal."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import RandLoraConfig, get_peft_model
from deltatune.errors import ConfigError


def adapted(*sizes, move: bool = True, **options):
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(width, out) for width, out in sizes])
    names = [str(i) for i in range(len(sizes))]
    model = get_peft_model(net, RandLoraConfig(target_modules=names, **options)).double()
    if move:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter))
    return model


def update(layer, shared, alpha, r):
    """The sum over bases.

    PEFT pairs direction c of the update with column (c // r, c % r) of B and with row c // bases of A, under the
    diagonals of base c % bases: the paper's equation, for B_j with other random columns.
    """
    own, (out, width) = layer.adapters["default"], layer.base_layer.weight.shape
    short, long, bases = min(out, width), max(out, width), math.ceil(min(out, width) / r)
    columns = shared.randlora_B[:long, :bases].reshape(long, -1)
    total = torch.zeros(long, short, dtype=torch.float64)
    for j in range(bases):
        B_j = torch.stack([columns[:, k * bases + j] for k in range(r)], dim=1)
        L_j, G_j = torch.diag(own.randlora_lambda[:, j]), torch.diag(own.randlora_gamma[j])
        total = total + B_j @ L_j @ shared.randlora_A[:, 0, :short] @ G_j
    return alpha / r * (total if out == long else total.T)


@pytest.mark.parametrize("sizes", [((6, 9), (9, 5)), ((5, 7), (7, 11))])
def test_it_is_the_papers_equation_with_shared_bases(sizes):
    model = adapted(*sizes, r=2, randlora_alpha=3)
    shared = model.get_base_model().shared_by_adapters["default"]
    for layer in list(model.get_base_model())[:2]:
        expected = layer.base_layer.weight + update(layer, shared, 3, 2)
        assert_close(layer.stored_weight(["default"]), expected)
        x = torch.randn(4, expected.shape[1], dtype=torch.float64)
        assert_close(layer(x), x @ expected.T + layer.base_layer.bias)


def test_the_update_has_full_rank_from_so_many_bases():
    """n = ceil(min / r) bases; n r + n min numbers train."""
    model = adapted((6, 9), r=4)
    own = model.get_base_model()[0].adapters["default"]
    assert own.randlora_lambda.shape == (4, 2) and own.randlora_gamma.shape == (2, 6)
    assert model.get_nb_trainable_parameters()[0] == 4 * 2 + 2 * 6
    layer = model.get_base_model()[0]
    assert torch.linalg.matrix_rank(layer.stored_weight(["default"]) - layer.base_layer.weight) == 6


def test_bases_are_uniform_in_bfloat16_or_sparse_signs():
    for options, share in (({}, 0.0), ({"sparse": True}, 2 / 3), ({"very_sparse": True}, 1 - 1 / math.sqrt(36))):
        shared = adapted((36, 40), r=6, **options).get_base_model().shared_by_adapters["default"]
        for basis in (shared.randlora_A, shared.randlora_B):
            assert basis.std().item() == pytest.approx(1, abs=0.01)
            assert basis.eq(0).double().mean().item() == pytest.approx(share, abs=0.1)
            assert len(basis.unique()) == 3 or torch.equal(basis, basis.bfloat16().double())


def test_starts():
    own = adapted((6, 9), r=4, move=False).get_base_model()[0].adapters["default"]
    assert own.randlora_lambda.eq(0).all() and own.randlora_gamma.sub(1 / 6).abs().max() < 1e-7
    own = adapted((6, 9), r=4, move=False, init_weights=False).get_base_model()[0].adapters["default"]
    assert own.randlora_lambda.std() > 0 and own.randlora_gamma.sub(1 / 9).abs().max() < 1e-7


def test_refusals():
    for options, field in (({"r": 0}, "r"), ({"randlora_alpha": 0}, "randlora_alpha"), ({"bias": "some"}, "bias")):
        with pytest.raises(ConfigError) as caught:
            RandLoraConfig(**options)
        assert caught.value.field == field
    with pytest.raises(ConfigError, match="leaves a basis of 2 numbers zero"):
        adapted((2, 2), r=1, very_sparse=True, projection_prng_key=2)
