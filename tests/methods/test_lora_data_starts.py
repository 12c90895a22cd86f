"""CorDA, LoRA-GA and EVA: what they take from data, against their papers; and the model that they leave as it was."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from deltatune import (
    CordaConfig,
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
)
from deltatune.errors import ConfigError, DataError, FormatError, MismatchError, PeftWarning, StateError, TargetError
from deltatune.lora import prepare
from deltatune.lora.components import Components

HELPERS = ("corda", "lora_ga", "eva")


class Net(nn.Module):
    """Takes batches as a transformer does, and gives a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.k, self.out = (
            nn.Embedding(50, 12),
            nn.Linear(12, 16),
            nn.Linear(12, 16),
            nn.Linear(16, 10),
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None):
        x = self.embed(input_ids)
        logits = self.out(torch.tanh(self.q(x)) * self.k(x))
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"logits": logits, "loss": loss}


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches(count: int = 4, rows: int = 6, tokens: int = 9) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(50, (rows, tokens), generator=draw),
            "labels": torch.randint(10, (rows, tokens), generator=draw),
        }
        for _ in range(count)
    ]


def config(init: str, **options) -> LoraConfig:
    return LoraConfig(
        **{"r": 3, "lora_alpha": 6, "target_modules": ["q", "k", "out"], "init_lora_weights": init, **options}
    )


def running(model: nn.Module, data=None):
    return lambda: [model(**batch) for batch in data or batches()].clear()


def stepping(model: nn.Module, data=None):
    return lambda: [model(**batch)["loss"].backward() for batch in data or batches()].clear()


def call(init: str, model: nn.Module, options: LoraConfig, run=None) -> None:
    """The helper of a start."""
    if init == "corda":
        preprocess_corda(model, options, run or running(model))
    elif init == "lora_ga":
        preprocess_loraga(model, options, run or stepping(model))
    else:
        get_eva_state_dict(model, batches(), options, *([] if run is None else [lambda model, batch: run()]))


def adapter(model: PeftModel, name: str):
    return getattr(model.get_base_model(), name).adapters["default"]


# ---------------------------------------------------------------------------------------------------------------- CorDA


def covariance(model: Net, name: str) -> np.ndarray:
    """Mean over the batches of X^T X, X the inputs divided by their largest number."""
    total = 0
    for batch in batches():
        with torch.no_grad():
            x = model.embed(batch["input_ids"])
            x = torch.tanh(model.q(x)) * model.k(x) if name == "out" else x
        X = (x.flatten(0, 1) / x.max().abs()).numpy().astype(np.float64)
        total = total + X.T @ X
    return total / len(batches())


@pytest.mark.parametrize("name", ["q", "out"])
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_splits_the_weight_along_the_directions_of_its_inputs(method, name):
    model = net()
    options = config("corda", corda_config=CordaConfig(corda_method=method))
    preprocess_corda(model, options, running(model))
    W = getattr(model, name).weight.detach().numpy().astype(np.float64)
    C = covariance(model, name)
    C += 0.01 * np.diag(C).mean() * np.eye(len(C))
    U, S, Vh = np.linalg.svd(W @ C, full_matrices=False)
    kept = slice(0, 3) if method == "ipm" else slice(-3, None)
    part = (U[:, kept] * S[kept]) @ Vh[kept] @ np.linalg.inv(C)
    lora = adapter(get_peft_model(model, options), name)
    found = lora.scaling * (lora.B @ lora.A).detach().numpy()
    np.testing.assert_allclose(found, part, atol=2e-4 * np.abs(part).max() + 1e-5)
    assert torch.equal(lora.start_A, lora.A) and torch.equal(lora.start_B, lora.B)


def test_cordas_covariances_serve_every_rank_and_its_decomposition_is_read_again(tmp_path):
    files = CordaConfig(cache_file=str(tmp_path / "a" / "parts.pt"), covariance_file=str(tmp_path / "b" / "cov.pt"))
    first, second, third = net(), net(), net()
    preprocess_corda(first, config("corda", corda_config=files), running(first))
    preprocess_corda(second, config("corda", corda_config=files))
    files.cache_file = None
    preprocess_corda(third, config("corda", corda_config=files, r=5))
    one, two = (adapter(get_peft_model(model, config("corda")), "q") for model in (first, second))
    assert torch.equal(one.A, two.A) and torch.equal(one.B, two.B)
    assert adapter(get_peft_model(third, config("corda", r=5)), "q").A.shape == (5, 12)
    files.cache_file = str(tmp_path / "a" / "parts.pt")
    with pytest.raises(MismatchError, match="nothing for"):
        preprocess_corda(nn.Sequential(nn.Linear(12, 16)), config("corda", corda_config=files, target_modules=["0"]))


def test_corda_without_anything_to_run_is_refused():
    with pytest.raises(ConfigError, match="run_model is needed"):
        preprocess_corda(net(), config("corda"))
    with pytest.raises(DataError, match="saw no input"):
        preprocess_corda(net(), config("corda"), lambda: None)


# -------------------------------------------------------------------------------------------------------------- LoRA-GA


def gradient(model: Net, name: str) -> np.ndarray:
    copied = copy.deepcopy(model)
    for batch in batches():
        (copied(**batch)["loss"] / len(batches())).backward()
    return getattr(copied, name).weight.grad.numpy()


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga_begins_along_the_singular_directions_of_the_gradient(direction):
    model, r = net(), 3
    options = config("lora_ga", lora_ga_config=LoraGAConfig(direction=direction, scale="unit"))
    preprocess_loraga(model, options, stepping(model))
    U, S, Vh = np.linalg.svd(gradient(model, "q"), full_matrices=False)
    of_A, of_B = {
        "ArB2r": (slice(0, r), slice(r, 2 * r)),
        "A2rBr": (slice(r, 2 * r), slice(0, r)),
        "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
    }[direction]
    lora = adapter(get_peft_model(model, options), "q")
    A, B = lora.A.detach().numpy(), lora.B.detach().numpy()
    np.testing.assert_allclose(np.abs(A), np.abs(Vh[of_A]), atol=1e-3)
    np.testing.assert_allclose(np.abs(B), np.abs(U[:, of_B] * S[of_B]), atol=1e-4)


def test_lora_gas_first_step_follows_the_gradient_as_far_as_rank_2r_goes():
    """With A and B orthonormal up to a scale, -dW = B B^T G + G A^T A, which holds the 2r leading parts of G."""
    model, r = net(), 3
    options = config("lora_ga", lora_ga_config=LoraGAConfig(scale="unit"))
    preprocess_loraga(model, options, stepping(model))
    G = gradient(model, "q")
    U, S, Vh = np.linalg.svd(G, full_matrices=False)
    lora = adapter(get_peft_model(model, options), "q")
    A, B = lora.A.detach().numpy(), lora.B.detach().numpy()
    along = G @ A.T @ A  # the part of the step that comes through B
    np.testing.assert_allclose(along, (U[:, :r] * S[:r]) @ Vh[:r], atol=1e-4)
    direction = B / np.linalg.norm(B, axis=0)
    np.testing.assert_allclose(direction @ direction.T @ G, (U[:, r : 2 * r] * S[r : 2 * r]) @ Vh[r : 2 * r], atol=1e-4)


@pytest.mark.parametrize("scale,factor", [("stable", 16**0.25 / 4), ("gd_scale", 0.5)])
def test_the_scales_of_lora_ga(scale, factor):
    def product(scale: str) -> Tensor:
        model = net()
        options = config("lora_ga", lora_ga_config=LoraGAConfig(scale=scale))
        torch.manual_seed(4)
        preprocess_loraga(model, options, stepping(model))
        return adapter(get_peft_model(model, options), "q").B

    assert_close(product(scale), factor * product("unit"))


def test_lora_ga_on_embeddings_and_convolutions_takes_their_gradients_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Conv1d(5, 8, 3), nn.Flatten(), nn.Linear(48, 2))
    ids = torch.randint(20, (4, 5))
    options = LoraConfig(r=2, target_modules=["0", "1", "3"], init_lora_weights="lora_ga", rank_pattern={"3": 1})
    preprocess_loraga(model, options, lambda: model(ids).square().sum().backward())
    expected = model(ids)
    adapted = get_peft_model(model, options)
    assert torch.equal(adapted(ids), expected)
    assert all(layer.adapters["default"].start_B.any() for layer in (model[0], model[1], model[3]))


def test_lora_ga_reads_its_gradients_again_and_needs_half_the_sides(tmp_path):
    model, file = net(), str(tmp_path / "gradients.pt")
    torch.manual_seed(0)
    preprocess_loraga(model, config("lora_ga"), stepping(model), file)
    other = net()
    torch.manual_seed(0)
    preprocess_loraga(other, config("lora_ga"), lambda: pytest.fail("the file is there"), file)
    one, two = (adapter(get_peft_model(m, config("lora_ga")), "q") for m in (model, other))
    assert torch.equal(one.A, two.A)
    with pytest.raises(ConfigError, match="use r=5"):
        preprocess_loraga(net(), config("lora_ga", r=6), stepping(net()))
    (tmp_path / "text.pt").write_text("no tensors")
    with pytest.raises(FormatError, match="remove it"):
        preprocess_loraga(net(), config("lora_ga"), stepping(net()), str(tmp_path / "text.pt"))


# ------------------------------------------------------------------------------------------------------------------ EVA


def test_components_of_batches_are_those_of_all_rows_together():
    torch.manual_seed(0)
    spread = torch.diag(0.5 ** torch.arange(10.0))
    X = torch.randn(300, 10) @ spread + torch.arange(10.0)
    components = Components(4)
    for batch in X.split(60):
        components.add(batch)
    centred = X.double() - X.double().mean(0)
    _, S, Vh = np.linalg.svd(centred.numpy(), full_matrices=False)
    np.testing.assert_allclose(components.S, S[:4], rtol=1e-3)
    np.testing.assert_allclose(np.abs(components.V.numpy() @ Vh[:4].T), np.eye(4), atol=2e-2)
    np.testing.assert_allclose(components.share, (S**2 / (S**2).sum())[:4], rtol=1e-3)


def test_eva_gives_the_ranks_to_the_components_that_explain_most():
    model = net()
    model.embed.weight.data *= 0.3 ** torch.arange(12.0)  # a few directions explain most of what goes into q
    data = batches(1, rows=30, tokens=12)
    options = config("eva", target_modules=["q", "out"], eva_config=EvaConfig(tau=0.9))
    components = get_eva_state_dict(model, data, options)
    assert sum(len(A) for A in components.values()) == 6, "two layers of rank 3"
    with torch.no_grad():
        x = model.embed(data[0]["input_ids"])
        inputs = {"q": x, "out": torch.tanh(model.q(x)) * model.k(x)}
    shares = {}
    for name, x in inputs.items():
        X = x.flatten(0, 1).double()
        _, S, Vh = np.linalg.svd((X - X.mean(0)).numpy(), full_matrices=False)
        shares |= {(name, place): share for place, share in enumerate((S**2 / (S**2).sum())[:6])}
        found = components[name].double().numpy()
        assert np.abs(np.abs(found @ Vh[: len(found)].T) - np.eye(len(found))).max() < 0.05
    assert len(components["q"]) != len(components["out"])
    best = sorted(shares, key=shares.get, reverse=True)[:6]
    assert {name: len(A) for name, A in components.items()} == {
        name: sum(owner == name for owner, _ in best) for name in inputs
    }


def test_eva_after_wrapping_changes_ranks_alphas_and_targets_but_not_the_output(tmp_path):
    data, x = batches(), batches()[0]["input_ids"]
    base = net()
    expected = base(x)["logits"]
    model = get_peft_model(base, config("eva", eva_config=EvaConfig(tau=0.8)))
    initialize_lora_eva_weights(model, data)
    assert torch.equal(model(x)["logits"], expected)
    found = model.peft_config["default"]
    for name, layer in ((n, getattr(base, n)) for n in ("q", "k", "out")):
        lora = layer.adapters["default"]
        assert lora.r == found.rank_pattern.get(name, 3) and lora.scaling == pytest.approx(2.0)
        assert lora.lora_A.weight.requires_grad and not lora.B.any()
        assert_close(lora.A @ lora.A.T, torch.eye(lora.r), rtol=1e-3, atol=1e-3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path)(x)["logits"], model(x)["logits"])


def test_a_layer_that_gets_no_rank_loses_the_adapter_and_is_no_target():
    model = get_peft_model(net(), config("eva"))
    zero = {"q": torch.eye(4, 12), "k": torch.zeros(0, 12), "out": torch.eye(3, 16)}
    initialize_lora_eva_weights(model, eva_state_dict=zero)
    assert isinstance(model.get_base_model().k, nn.Linear)
    found = model.peft_config["default"]
    assert found.target_modules == {"q", "out"} and found.rank_pattern == {"q": 4}
    assert found.alpha_pattern == {"q": 8.0} and adapter(model, "q").scaling == 2.0
    assert torch.equal(adapter(model, "q").A, torch.eye(4, 12))


def test_whitening_divides_by_the_root_of_the_singular_value_once():
    """In PEFT as often as layers have the same input."""
    plain, white = (
        get_eva_state_dict(net(), batches(), config("eva", eva_config=EvaConfig(tau=0.8, rho=1.0, whiten=whiten)))
        for whiten in (False, True)
    )
    scale = {name: white[name].norm(dim=1) / plain[name].norm(dim=1) for name in white}
    assert_close(scale["q"], scale["k"])
    assert_close(white["k"], plain["k"] * scale["k"][:, None])


def test_tokens_without_a_label_and_padding_do_not_count():
    data = batches(2)
    for batch in data:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][:, 6:] = 0
        batch["labels"][:, 0] = -100
    seen = []

    def rows(x, places, name):
        found = x[0][places.T.unbind()]
        seen.append(len(found))
        return found

    get_eva_state_dict(net(), data, config("eva", eva_config=EvaConfig(tau=0.5)), prepare_layer_inputs_fn=rows)
    assert set(seen) == {6 * 5}
    seen.clear()
    options = config("eva", eva_config=EvaConfig(tau=0.5, use_label_mask=False))
    get_eva_state_dict(net(), data, options, prepare_layer_inputs_fn={"q": rows, "k": rows, "out": rows})
    assert set(seen) == {6 * 6}


def test_eva_says_what_is_missing():
    options = config("eva")
    with pytest.raises(DataError, match="no batches"):
        get_eva_state_dict(net(), [], options)
    with pytest.raises(DataError, match="no batch has the 6 tokens"):
        get_eva_state_dict(net(), batches(2, rows=1, tokens=4), options)
    with pytest.raises(ConfigError, match="peft_config is needed"):
        get_eva_state_dict(net(), batches())
    with pytest.raises(ConfigError, match="are no layers of the adapter"):
        get_eva_state_dict(net(), batches(), options, prepare_layer_inputs_fn={"v": None})
    with pytest.raises(StateError, match="get_peft_model first"):
        initialize_lora_eva_weights(net(), batches())
    with pytest.raises(ConfigError, match="not one of"):
        initialize_lora_eva_weights(get_peft_model(net(), config("pissa")), batches())
    model = get_peft_model(net(), options)
    with pytest.raises(ConfigError, match="dataloader is needed"):
        initialize_lora_eva_weights(model)
    with pytest.raises(MismatchError, match=r"expected \(rank, 12\)"):
        initialize_lora_eva_weights(model, eva_state_dict={"q": torch.eye(3, 5)})
    assert model.peft_config["default"].rank_pattern == {}
    with pytest.warns(PeftWarning, match="keep LoRA's own start"):
        initialize_lora_eva_weights(model, eva_state_dict={"q": torch.eye(3, 12)})


# ------------------------------------------------------------------------------------------------------------ all three


@pytest.mark.parametrize("init", HELPERS)
def test_prepare_does_what_the_helper_does(init):
    data = batches()
    first, second = net(), net()
    one, two = config(init), config(init)
    torch.manual_seed(3)
    prepare(first, one, data)
    torch.manual_seed(3)
    first = get_peft_model(first, one)
    torch.manual_seed(3)
    if init == "eva":
        second = get_peft_model(second, two)
        initialize_lora_eva_weights(second, data)
    else:
        call(init, second, two)
        second = get_peft_model(second, two)
    for name in ("q", "k", "out"):
        assert torch.equal(adapter(first, name).A, adapter(second, name).A)
    assert first.peft_config["default"].rank_pattern == second.peft_config["default"].rank_pattern


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("init", HELPERS)
def test_the_model_is_as_it_was_also_after_a_failure(init, fails):
    model = net()
    model.q.train()
    model.k.eval()
    model.embed.requires_grad_(False)
    model.out.weight.grad = torch.ones(10, 16)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]

    def broken() -> None:
        model(**batches()[0])
        raise KeyError("broken")

    if fails:
        with pytest.raises(KeyError, match="broken"):
            call(init, model, config(init), broken)
        if init != "eva":
            with pytest.raises(ConfigError, match="has no data yet"):
                get_peft_model(copy.deepcopy(model), config(init))
    else:
        call(init, model, config(init))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model.out.weight.grad, torch.ones(10, 16)) and model.q.weight.grad is None
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_trained_saved_and_loaded_without_data(init, tmp_path):
    model, options, x = net(), config(init), batches()[0]["input_ids"]
    expected = model(x)["logits"]
    prepare(model, options, batches())
    model = get_peft_model(model, options)
    assert torch.equal(model(x)["logits"], expected)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(loaded(x)["logits"], model(x)["logits"])
    assert loaded.peft_config["default"].init_lora_weights == init
    with loaded.disable_adapter():
        assert torch.equal(loaded(x)["logits"], expected)
    loaded.save_pretrained(tmp_path / "again")
    again, once = tmp_path / "again" / "adapter_model.safetensors", tmp_path / "adapter_model.safetensors"
    assert again.read_bytes() == once.read_bytes()
    second = copy.deepcopy(loaded)
    assert torch.equal(second(x)["logits"], model(x)["logits"])
    loaded.load_adapter(tmp_path, "other")
    loaded.set_adapter("other")
    assert torch.equal(loaded(x)["logits"], model(x)["logits"])


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_what_was_prepared_with_another_rank_or_for_other_layers_is_refused(init):
    model = net()
    prepare(model, config(init), batches())
    with pytest.raises(ConfigError, match="again"):
        get_peft_model(model, config(init, r=2))
    with pytest.raises(ConfigError, match="has no data yet"):
        get_peft_model(copy.deepcopy(net()), config(init))
    with pytest.raises(ConfigError, match="this helper is for"):
        call(init, net(), config("pissa"))


def test_what_a_start_from_data_is_not_for_is_refused_before_the_data_are_read():
    model = net()
    with pytest.raises(TargetError, match="it is for linear layers"):
        preprocess_corda(model, config("corda", target_modules=["embed"]), lambda: pytest.fail("read"))


def test_eva_that_trains_without_data_is_told_of_once(recwarn):
    data = batches()
    model = get_peft_model(net(), config("eva")).train()
    with pytest.warns(PeftWarning, match="'eva' and has seen no data.*initialize_lora_eva_weights"):
        model(**data[0])
    recwarn.clear()
    model(**data[0])
    later = get_peft_model(net(), config("eva"))
    initialize_lora_eva_weights(later, data)
    for ready in (later, _prepared(data), get_peft_model(net(), config(True))):
        ready.train()(**data[0])
    assert not [w for w in recwarn if "has seen no data" in str(w.message)]


def _prepared(data):
    base, options = net(), config("eva")
    prepare(base, options, data)
    return get_peft_model(base, options)
