"""PVeRA against arXiv 2512.07703: h = W x + diag(b) B z, z ~ N(m, exp(v)), (m, v) the halves of diag(d) A x."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import PveraConfig, get_peft_model
from deltatune.errors import ConfigError


def adapted(layer: nn.Module | None = None, move: bool = True, **options):
    torch.manual_seed(0)
    net = nn.ModuleDict({"layer": layer or nn.Linear(6, 9)})
    model = get_peft_model(net, PveraConfig(r=4, target_modules=["layer"], **options)).double().eval()
    wrapper = model.get_base_model()["layer"]
    if move:
        for parameter in wrapper.adapters["default"].parameters():
            nn.init.normal_(parameter)
    return model, wrapper, wrapper.adapters["default"]


def moments(x, pvera):
    A = pvera.shared.pvera_A[:, : x.shape[-1]]
    mean = x @ A[:4].T * pvera.pvera_lambda_d[:4]
    log_variance = x @ A[4:].T * pvera.pvera_lambda_d[4:]
    return mean, log_variance


def test_outside_of_training_it_is_veras_equation_with_the_means():
    _, layer, pvera = adapted()
    x = torch.randn(5, 6, dtype=torch.float64)
    mean, _ = moments(x, pvera)
    expected = layer.base_layer(x) + mean @ pvera.shared.pvera_B.T * pvera.pvera_lambda_b
    assert_close(layer(x), expected)
    assert_close(x @ layer.stored_weight(["default"]).T + layer.base_layer.bias, expected)


def test_in_training_z_is_a_gaussian_around_them():
    _, layer, pvera = adapted()
    x = torch.randn(1, 6, dtype=torch.float64).expand(40000, 6)
    mean, log_variance = moments(x[:1], pvera)
    sampled = layer.train()(x) - layer.base_layer(x)
    out = pvera.pvera_lambda_b[:, None] * pvera.shared.pvera_B
    covariance = out @ torch.diag(log_variance[0].exp()) @ out.T
    assert_close(sampled.mean(0), (mean @ out.T)[0], atol=0.2, rtol=0.02)
    assert_close(torch.cov(sampled.T), covariance, atol=0.3, rtol=0.1)


def test_the_second_half_of_d_learns_in_training():
    _, layer, pvera = adapted()
    layer.train()(torch.randn(5, 6, dtype=torch.float64)).square().sum().backward()
    assert pvera.pvera_lambda_d.grad.abs().min() > 0


@pytest.mark.parametrize("layer,shape", [(nn.Conv2d(3, 5, 2), (3, 6, 6)), (nn.Linear(6, 9), (3, 6))])
def test_samples_of_any_layer_follow_the_seed_of_the_generator(layer, shape):
    _, wrapper, _ = adapted(layer, generator_seed=7)
    clone, x = copy.deepcopy(wrapper).train(), torch.randn(2, *shape, dtype=torch.float64)
    first = wrapper.train()(x)
    assert torch.equal(clone(x), first) and not torch.equal(wrapper(x), first)
    assert first.shape == wrapper.base_layer(x).shape


def test_sampling_at_inference():
    _, layer, pvera = adapted(sample_at_inference=True)
    x = torch.randn(5, 6, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x)) and "samples in every call" in pvera.deterministic


def test_counts_and_starts():
    model, _, pvera = adapted(move=False, d_initial=0.3)
    assert model.get_nb_trainable_parameters()[0] == 9 + 2 * 4
    assert pvera.pvera_lambda_b.eq(0).all() and pvera.pvera_lambda_d.sub(0.3).abs().max() < 1e-7
    assert pvera.shared.pvera_A.shape == (8, 6) and pvera.shared.pvera_B.shape == (9, 4)


def test_options_are_checked():
    for options, field in (({"r": 0}, "r"), ({"pvera_dropout": 1.0}, "pvera_dropout"), ({"bias": "some"}, "bias")):
        with pytest.raises(ConfigError) as caught:
            PveraConfig(**options)
        assert caught.value.field == field
