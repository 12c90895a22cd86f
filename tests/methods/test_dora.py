"""DoRA against arXiv 2402.09353: W' = m (W + B A) / ||W + B A||, and section 4.3, the norm a constant in gradients."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import DoraCaching, LoraConfig, get_peft_model
from deltatune.errors import ConfigError
from deltatune.lora.variants.dora import row_lengths
from tests.core.tiny import batch, tiny
from tests.laws.examples import move


def adapted(layer: nn.Module, shake: bool = True, **options):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["layer"], use_dora=True, **{"r": 3, "lora_alpha": 6, **options})
    model = get_peft_model(nn.ModuleDict({"layer": layer.double()}), config).double()
    wrapper = model.get_base_model()["layer"]
    lora = wrapper.adapters["default"]
    if shake:
        for parameter in lora.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.5)
    return wrapper.eval(), lora


def by_hand(weight: torch.Tensor, lora, scale: float = 2.0) -> torch.Tensor:
    """Row by row, as the paper's equation (5) has it by column of its transposed weight."""
    A, B, m = lora.lora_A.weight.flatten(1), lora.lora_B.weight.flatten(1), lora.lora_magnitude_vector.weight.flatten()
    rows = []
    for out in range(len(weight)):
        direction = weight[out] + scale * sum(B[out, k] * A[k] for k in range(len(A)))
        rows.append(m[out] * direction / math.sqrt(sum(entry**2 for entry in direction.tolist())))
    return torch.stack(rows)


@pytest.mark.parametrize("rslora", [False, True])
def test_each_row_has_the_length_m_and_the_direction_of_the_updated_row(rslora):
    wrapper, lora = adapted(nn.Linear(6, 4), use_rslora=rslora)
    expected = by_hand(wrapper.base_layer.weight, lora, 6 / math.sqrt(3) if rslora else 2.0)
    x = torch.randn(7, 6, dtype=torch.float64)
    assert_close(wrapper(x), x @ expected.T + wrapper.base_layer.bias)
    assert_close(wrapper.stored_weight(["default"]), expected)
    assert_close(expected.norm(dim=1), lora.lora_magnitude_vector.weight.abs())


def test_on_an_embedding_m_scales_the_columns_of_the_table():
    wrapper, lora = adapted(nn.Embedding(9, 5))
    x = torch.tensor([[0, 3, 8]])
    assert lora.lora_magnitude_vector.weight.shape == (5,)
    assert_close(wrapper(x), by_hand(wrapper.base_layer.weight.T, lora).T[x])


@pytest.mark.parametrize(
    "layer,shape",
    [(nn.Conv1d(3, 4, 2), (2, 3, 7)), (nn.Conv2d(3, 4, 3, padding=1, stride=2), (2, 3, 5, 6)),
     (nn.Conv3d(2, 4, 2, bias=False), (1, 2, 3, 4, 3))],
)  # fmt: skip
def test_on_a_convolution_m_is_a_number_per_output_channel(layer, shape):
    wrapper, lora = adapted(copy.deepcopy(layer))
    kernel = wrapper.base_layer.weight
    assert lora.lora_magnitude_vector.weight.shape == (1, 4, *[1] * (kernel.ndim - 2)), "as in PEFT's files"
    plain = copy.deepcopy(wrapper.base_layer)
    plain.weight = nn.Parameter(by_hand(kernel.flatten(1), lora).reshape(kernel.shape))
    x = torch.randn(shape, dtype=torch.float64)
    assert_close(wrapper(x), plain(x))
    assert_close(wrapper(x[0]), plain(x[0]))


def test_a_fresh_adapter_changes_no_bit():
    for bias in (True, False):
        layer = nn.Linear(40, 30, bias=bias)
        model = get_peft_model(nn.ModuleDict({"layer": layer}), LoraConfig(use_dora=True, target_modules=["layer"]))
        wrapper, x = model.get_base_model()["layer"], torch.randn(50, 40)
        assert torch.equal(wrapper(x), layer(x))


def test_whatever_the_factors_start_as_the_weight_starts_as_loras():
    """m is the length of W + B A, as in PEFT, not of W."""
    wrapper, lora = adapted(nn.Linear(6, 4), shake=False, init_lora_weights=False)
    plain = wrapper.base_layer.weight + 2 * lora.lora_B.weight @ lora.lora_A.weight
    assert lora.lora_B.weight.abs().max() > 0
    assert_close(wrapper.stored_weight(["default"]), plain)


def test_the_lengths_are_constants_in_the_gradient():
    wrapper, lora = adapted(nn.Linear(6, 4))
    x, goal = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    own = [lora.lora_A.weight, lora.lora_B.weight, lora.lora_magnitude_vector.weight]
    got = torch.autograd.grad((wrapper(x) - goal).square().sum(), own)
    A, B, m = own
    direction = wrapper.base_layer.weight.detach() + 2 * B @ A
    constant = direction.detach().norm(dim=1)
    out = x @ (m[:, None] * direction / constant[:, None]).T + wrapper.base_layer.bias.detach()
    expected = torch.autograd.grad((out - goal).square().sum(), own, retain_graph=True)
    read = nn.functional.linear(x, wrapper.stored_weight(["default"]), wrapper.base_layer.bias)
    by_weight = torch.autograd.grad((read - goal).square().sum(), own)
    for one, other, third in zip(got, expected, by_weight):
        assert_close(one, other)
        assert_close(third, other)
    through = x @ (m[:, None] * direction / direction.norm(dim=1)[:, None]).T + wrapper.base_layer.bias.detach()
    not_this = torch.autograd.grad((through - goal).square().sum(), B)[0]
    assert not torch.allclose(got[1], not_this, rtol=1e-3)


def test_dropout_thins_the_input_of_the_update_and_of_the_change_of_length():
    """As the paper's code: y = W x + b + (g - 1) W x~ + g s B A x~ with g = m / ||W + s B A||."""
    wrapper, lora = adapted(nn.Linear(6, 4), lora_dropout=0.5)
    wrapper.train()
    x = torch.randn(20, 6, dtype=torch.float64)
    torch.manual_seed(3)
    got = wrapper(x)
    torch.manual_seed(3)
    thin = nn.functional.dropout(x, 0.5)
    W, b = wrapper.base_layer.weight, wrapper.base_layer.bias
    g = lora.lora_magnitude_vector.weight / (W + 2 * lora.B @ lora.A).norm(dim=1)
    assert_close(got, x @ W.T + b + (g - 1) * (thin @ W.T) + g * 2 * (thin @ lora.A.T @ lora.B.T))


def test_a_bias_of_b_is_added_unstretched():
    wrapper, lora = adapted(nn.Linear(6, 4), lora_bias=True)
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = x @ by_hand(wrapper.base_layer.weight, lora).T + wrapper.base_layer.bias + 2 * lora.lora_B.bias
    assert_close(wrapper(x), expected)
    merged = wrapper.merged_parameters(["default"], check=True)
    assert_close(nn.functional.linear(x, merged.weight, merged.bias), expected)


def test_lengths_of_rows_are_those_of_the_dense_matrix():
    torch.manual_seed(0)
    for scale in (1e-3, 1.0, 1e3):
        W, A, B = torch.randn(30, 50), torch.randn(4, 50), scale * torch.randn(30, 4)
        assert_close(
            row_lengths(W, A, B), (W.double() + B.double() @ A.double()).norm(dim=1).float(), rtol=1e-5, atol=0
        )
    half = torch.randn(30, 50).bfloat16()
    assert_close(row_lengths(half, A, B), (half.float() + B @ A).norm(dim=1), rtol=1e-5, atol=0)


def test_a_row_of_zeros_stays_one_and_stays_finite():
    layer = nn.Linear(6, 4)
    layer.weight.data[1] = 0
    wrapper, _lora = adapted(layer, shake=False)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    wrapper(x).sum().backward()
    assert torch.equal(wrapper(x)[:, 1], layer.bias[1].expand(5)) and x.grad.isfinite().all()
    assert wrapper.stored_weight(["default"]).isfinite().all()


def test_in_half_precision_a_small_change_of_m_is_not_rounded_away():
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False).bfloat16()
    model = get_peft_model(nn.ModuleDict({"layer": layer}), LoraConfig(use_dora=True, target_modules=["layer"]))
    wrapper = model.get_base_model()["layer"]
    lora = wrapper.adapters["default"]
    assert lora.lora_magnitude_vector.weight.dtype == torch.float32
    x = torch.randn(500, 64).bfloat16()
    before = wrapper(x).float()
    lora.lora_magnitude_vector.weight.data.mul_(1.011)  # as a bfloat16 itself this would be 1.0078
    assert ((wrapper(x).float() - before) / before).mean().item() == pytest.approx(0.011, rel=0.05)


def test_with_kasa_and_qalora_it_is_the_length_of_all_of_it():
    wrapper, lora = adapted(nn.Linear(8, 6), use_qalora=True, qalora_group_size=2, kasa_config={}, lora_dropout=0.3)
    U, S, V = torch.linalg.svd(wrapper.base_layer.weight)
    kept = U[:, :3] @ torch.diag(S[:3]) @ V[:3]
    direction = (
        kept + 2 * lora.lora_B.weight @ torch.diag(lora.lora_diag) @ lora.lora_A.weight.repeat_interleave(2, 1) * 2
    )
    m = lora.lora_magnitude_vector.weight
    expected = (m / direction.norm(dim=1))[:, None] * direction
    x = torch.randn(5, 8, dtype=torch.float64)
    assert_close(wrapper(x), x @ expected.T + wrapper.base_layer.bias)
    wrapper.train()
    torch.manual_seed(3)
    got = wrapper(x)
    torch.manual_seed(3)
    thin, g = nn.functional.dropout(x, 0.3), m / direction.norm(dim=1)
    trained = direction - kept
    assert_close(got, x @ kept.T + wrapper.base_layer.bias + (g - 1) * (thin @ kept.T) + g * (thin @ trained.T))


def test_two_of_them_are_one_after_the_other():
    wrapper, first = adapted(nn.Linear(6, 4))
    other = copy.deepcopy(first)
    for parameter in other.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    wrapper.add("other", other)
    wrapper.selection.active = ("default", "other")
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = by_hand(by_hand(wrapper.base_layer.weight, first), other)
    assert_close(wrapper(x), x @ expected.T + wrapper.base_layer.bias)


# ------------------------------------------------------------------------------------------------------------- caching


@pytest.fixture
def counted(monkeypatch):
    """How often lengths are worked out."""
    from deltatune.lora.variants import dora

    calls = []
    inside = dora.row_lengths
    monkeypatch.setattr(dora, "row_lengths", lambda *given: calls.append(1) or inside(*given))
    return calls


def test_caching_keeps_the_lengths_in_evaluation_without_gradients(counted):
    wrapper, _ = adapted(nn.Linear(6, 4))
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = wrapper(x)
    counted.clear()
    with torch.no_grad():
        wrapper(x), wrapper(x)
        assert len(counted) == 2
        with DoraCaching():
            assert torch.equal(wrapper(x), expected) and torch.equal(wrapper(x), expected)
            assert len(counted) == 3
            with DoraCaching(enabled=False):
                wrapper(x)
            assert len(counted) == 4
        wrapper(x)
        assert len(counted) == 5
    with DoraCaching():
        wrapper(x), wrapper.train()(x)
        assert len(counted) == 7, "not where gradients are recorded, nor in training"


def changes(wrapper, lora) -> dict:
    step = torch.optim.SGD([lora.lora_A.weight], lr=1.0)
    lora.lora_A.weight.grad = torch.ones_like(lora.lora_A.weight)
    file = {name: tensor.detach() + 1 for name, tensor in lora.file_tensors().items()}
    return {
        "a step": step.step,
        "an assignment": lambda: lora.lora_B.weight.mul_(2),
        "a length": lambda: lora.lora_magnitude_vector.weight.mul_(2),
        "a file": lambda: lora.load_file_tensors(file),
        "the base": lambda: wrapper.base_layer.weight.add_(1),
        "another base": lambda: setattr(wrapper.base_layer, "weight", nn.Parameter(wrapper.base_layer.weight + 1)),
        "another precision": lambda: wrapper.to(torch.float64),
    }


@pytest.mark.parametrize("change", changes(*adapted(nn.Linear(6, 4))))
def test_a_kept_length_is_never_an_old_one(change):
    wrapper, lora = adapted(nn.Linear(6, 4))
    x = torch.randn(5, 6, dtype=torch.float64)
    act = changes(wrapper, lora)[change]
    with torch.no_grad(), DoraCaching():
        wrapper(x)
        act()
        got = wrapper(x)
    with torch.no_grad():
        assert torch.equal(got, wrapper(x))


def test_training_drops_what_is_kept_even_if_torch_counts_no_change(counted):
    """A fused optimizer changes parameters uncounted."""
    wrapper, lora = adapted(nn.Linear(6, 4))
    x = torch.randn(5, 6, dtype=torch.float64)
    with DoraCaching():
        with torch.no_grad():
            wrapper(x)
        wrapper.train()(x)
        lora.lora_B.weight.data.mul_(2)
        wrapper.eval()
        with torch.no_grad():
            got = wrapper(x)
    with torch.no_grad():
        assert torch.equal(got, wrapper(x))


def test_the_standing_switch_and_copies(counted):
    wrapper, _ = adapted(nn.Linear(6, 4))
    x = torch.randn(5, 6, dtype=torch.float64)
    DoraCaching()(enabled=True)
    try:
        with torch.no_grad():
            counted.clear()
            wrapper(x), wrapper(x)
            assert len(counted) == 1
            twin = copy.deepcopy(wrapper)
            assert torch.equal(twin(x), wrapper(x)) and len(counted) == 2, "copies start with nothing kept"
    finally:
        DoraCaching()(enabled=False)


def test_under_an_adapter_that_changes_the_weight_nothing_is_kept(counted):
    wrapper, first = adapted(nn.Linear(6, 4))
    other = copy.deepcopy(first)
    wrapper.add("other", other)
    wrapper.selection.active = ("default", "other")
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad(), DoraCaching():
        wrapper(x)
        first.lora_B.weight.mul_(3)
        got = wrapper(x)
    with torch.no_grad():
        assert torch.equal(got, wrapper(x))


# -------------------------------------------------------------------------------------------------------------- models


def test_checkpointing_gives_the_same_gradients():
    def gradients(checkpointed: bool):
        torch.manual_seed(0)
        model = get_peft_model(
            tiny("llama"), LoraConfig(use_dora=True, r=4, lora_dropout=0.2, target_modules="all-linear")
        )
        move(model, 0.1)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        model(**batch("llama")).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys() and any("magnitude" in name for name in plain)
    for name in plain:
        assert_close(again[name], plain[name], rtol=1e-5, atol=1e-6)


def test_autocast_does_not_round_the_lengths():
    wrapper, lora = adapted(nn.Linear(64, 32).float(), r=4)
    wrapper.float()
    lora.float()
    x = torch.randn(5, 64)
    expected = wrapper(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = wrapper(x)
    assert got.dtype == torch.bfloat16
    assert_close(got.float(), expected, rtol=0.05, atol=0.05)


def test_compiled_it_is_one_graph():
    torch._dynamo.reset()
    wrapper, lora = adapted(nn.Linear(6, 4), lora_dropout=0.2)
    compiled, x = torch.compile(wrapper, fullgraph=True, backend="aot_eager"), torch.randn(5, 6, dtype=torch.float64)
    for training in (False, True):
        wrapper.train(training)
        torch.manual_seed(1)
        got = compiled(x)
        torch.manual_seed(1)
        assert_close(got, wrapper(x))
    lora.lora_B.weight.data.mul_(2)
    assert_close(compiled.eval()(x), wrapper.eval()(x))
    torch._dynamo.reset()


def test_meta_bases_have_shapes():
    with torch.device("meta"):
        base = nn.ModuleDict({"layer": nn.Linear(6, 4)})
    model = get_peft_model(base, LoraConfig(use_dora=True, r=2, target_modules=["layer"]))
    assert model.get_nb_trainable_parameters()[0] == 2 * (6 + 4) + 4


def test_what_programs_read():
    wrapper, lora = adapted(nn.Linear(6, 4))
    assert wrapper.lora_magnitude_vector["default"].weight is lora.lora_magnitude_vector.weight
    assert wrapper.use_dora == {"default": True}
    assert set(lora.file_tensors()) == {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"}


def test_wrong_values_are_refused():
    with pytest.raises(ConfigError, match="use_dora"):
        LoraConfig(use_dora="yes")
