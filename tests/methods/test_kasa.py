"""KaSA against arXiv 2412.06071: the smallest singular values go, diag(d) stands between B and A, and its loss."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import KasaConfig, LoraConfig, get_peft_model
from deltatune.errors import ConfigError
from tests.core.tiny import batch, tiny


def adapted(layer: nn.Module | None = None, shake: bool = True, **options):
    torch.manual_seed(0)
    layer = nn.Linear(7, 6) if layer is None else layer
    config = LoraConfig(target_modules=["layer"], **{"r": 2, "lora_alpha": 6, "kasa_config": KasaConfig(), **options})
    model = get_peft_model(nn.ModuleDict({"layer": layer.double()}), config).double()
    wrapper = model.get_base_model()["layer"]
    lora = wrapper.adapters["default"]
    for parameter in lora.parameters() if shake else ():
        nn.init.normal_(parameter)
    return model, wrapper.eval(), lora


def truncated(weight: torch.Tensor, r: int) -> torch.Tensor:
    U, S, V = torch.linalg.svd(weight)
    return sum(S[i] * torch.outer(U[:, i], V[i]) for i in range(len(S) - r))


def test_the_smallest_singular_values_are_left_out_and_d_gates_the_ranks():
    _, wrapper, lora = adapted()
    A, B, d = lora.lora_A.weight, lora.lora_B.weight, lora.lora_diag
    assert d.shape == (2,)
    expected = truncated(wrapper.base_layer.weight, 2) + 3 * sum(d[k] * torch.outer(B[:, k], A[k]) for k in range(2))
    x = torch.randn(5, 7, dtype=torch.float64)
    assert_close(wrapper(x), x @ expected.T + wrapper.base_layer.bias)
    assert_close(wrapper.stored_weight(["default"]), expected)


def test_the_base_keeps_its_weight():
    """PEFT's is truncated in place, and stays so."""
    weight = nn.Linear(7, 6).weight.detach().double()
    layer = nn.Linear(7, 6)
    layer.weight.data = weight.clone()
    model, wrapper, _ = adapted(layer)
    x = torch.randn(5, 7, dtype=torch.float64)
    with model.disable_adapter():
        assert torch.equal(wrapper(x), layer(x))
    assert torch.equal(model.unload()["layer"].weight, weight)


def test_what_is_left_out_of_the_base_sees_no_dropout():
    _, wrapper, lora = adapted(lora_dropout=0.5)
    wrapper.train()
    x = torch.randn(9, 7, dtype=torch.float64)
    torch.manual_seed(1)
    got = wrapper(x)
    torch.manual_seed(1)
    thin = nn.functional.dropout(x, 0.5)
    base = x @ truncated(wrapper.base_layer.weight, 2).T + wrapper.base_layer.bias
    assert_close(got, base + 3 * (thin @ lora.lora_A.weight.T * lora.lora_diag) @ lora.lora_B.weight.T)


@pytest.mark.parametrize("layer,shape", [(nn.Embedding(9, 5), None), (nn.Conv2d(2, 5, 2), (2, 2, 3, 3))])
def test_other_layers_are_matrices_too(layer, shape):
    _, wrapper, _lora = adapted(layer, shake=False)
    plain = wrapper.as_map()
    x = torch.arange(9) if shape is None else torch.randn(shape, dtype=torch.float64)
    assert_close(wrapper(x), plain.apply(x, truncated(plain.weight, 2), plain.bias))


def test_its_loss_is_that_of_equations_9_to_12():
    model = get_peft_model(
        tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], kasa_config={"beta": 0.3, "gamma": 0.5})
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    model.train()
    parts = [m.adapters["default"] for m in model.modules() if hasattr(m, "adapters")]
    assert len(parts) == 3
    eye = torch.eye(2)
    expected = sum(
        0.3 * p.lora_diag.square().sum()
        + 0.5 * torch.linalg.norm(p.lora_B.weight.T @ p.lora_B.weight - eye)
        + 0.5 * torch.linalg.norm(p.lora_A.weight @ p.lora_A.weight.T - eye)
        for p in parts
    )
    assert_close(model.penalty(), expected)
    with_it = model(**batch("llama")).loss
    with torch.no_grad():
        assert_close(with_it.detach() - model(**batch("llama")).loss, expected.detach(), rtol=1e-4, atol=1e-4)
    plain = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"])).train()
    assert plain.penalty() is None


def test_pefts_name_for_it_gives_what_the_loss_of_the_pass_lacks():
    """A program that adds it to the loss has it once, whether that loss is the model's or its own."""
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], kasa_config={"beta": 0.3})).train()
    inputs = batch("llama")
    for _ in range(2):
        model(**inputs)
        assert model.base_model._get_kasa_loss() == model._get_monteclora_loss() == 0.0
        model(input_ids=inputs["input_ids"])
        assert_close(model.base_model._get_kasa_loss(), model.penalty())


def test_a_plain_lora_step_walks_over_no_layers_for_a_penalty(monkeypatch):
    from deltatune import inject

    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"])).train()
    monkeypatch.setattr(inject, "adapted_layers", lambda model: pytest.fail("walked"))
    model(**batch("llama"))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"r=6 smallest singular values of layer, which has 6; use at most r=5"):
        adapted(r=6)
    with pytest.raises(ConfigError, match=r"KasaConfig: beta=-1"):
        KasaConfig(beta=-1)
    with pytest.raises(ConfigError, match=r"KasaConfig: gamma=nan"):
        LoraConfig(kasa_config={"gamma": float("nan")})
    config = LoraConfig(kasa_config={}, target_modules=["layer"])
    config.kasa_config = {"beta": 0.5}  # a config is mutable
    assert config.kasa_config == {"beta": 0.5} and config.validate() is None
    assert config.kasa_config == KasaConfig(beta=0.5)
    config.kasa_config.beta = "much"
    with pytest.raises(ConfigError, match="beta='much'"):
        get_peft_model(nn.ModuleDict({"layer": nn.Linear(12, 12)}), config)
