"""Diff pruning against arXiv 2012.07463: W + z * w, hard-concrete z under an L0 penalty, then the largest entries."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import DiffPruningConfig, PeftModel, get_peft_model
from deltatune.errors import ConfigError
from tests.laws.examples import move


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def base() -> Net:
    torch.manual_seed(0)
    return Net().double().eval()


def adapted(shake: bool = True, **options):
    options = {"prune_step": 5, "init_alpha": 1.0, "alpha_speed": 2.0, "target_modules": ["first", "second"], **options}
    model = get_peft_model(base(), DiffPruningConfig(**options))
    if shake:
        move(model)
    layers = [model.get_base_model().first, model.get_base_model().second]
    return model, layers, [layer.adapters["default"] for layer in layers]


def gate(alpha: float, u: float = 0.5) -> float:
    """Section 3.1: s = sigma(log u - log(1 - u) + alpha), z = min(1, max(0, s (r - l) + l))."""
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + alpha)))
    return min(1.0, max(0.0, s * 3.0 - 1.5))


@pytest.mark.parametrize("structured", [True, False])
def test_the_difference_is_gated_entry_by_entry(structured):
    _, layers, adapters = adapted(structured=structured)
    layer, a = layers[0], adapters[0]
    expected = layer.base_layer.weight.detach().clone()
    group = gate(1 + 2 * a.diff_group_alpha.item()) if structured else 1.0
    for i in range(6):
        for j in range(8):
            expected[i, j] += gate(1 + 2 * a.diff_alpha[i, j].item()) * group * a.diff_w[i, j].item()
    assert_close(layer.stored_weight(["default"]), expected)
    x = torch.randn(3, 8, dtype=torch.float64)
    assert_close(layer(x), x @ expected.T + layer.base_layer.bias)


def test_gates_are_drawn_in_training(monkeypatch):
    model, layers, adapters = adapted(structured=False)
    a = adapters[0]
    u = torch.rand(6, 8, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand_like", lambda tensor: u)
    a.train()
    expected = [[gate(1 + 2 * a.diff_alpha[i, j].item(), u[i, j].item()) for j in range(8)] for i in range(6)]
    assert_close(a.gates(), torch.tensor(expected, dtype=torch.float64))
    monkeypatch.undo()
    model.train()
    x = torch.randn(3, 8, dtype=torch.float64)
    assert not torch.equal(layers[0](x), layers[0](x))
    model.eval()
    assert torch.equal(layers[0](x), layers[0](x))


@pytest.mark.parametrize("structured", [True, False])
def test_the_penalty_is_the_expected_number_of_open_gates(structured):
    """A gate is open where s (r - l) + l > 0: P(z > 0) = sigma(alpha - log(-l / r)), and -l = r."""
    model, _, adapters = adapted(structured=structured, l0_weight=0.25)
    model.train()
    expected = 0.0
    for a in adapters:
        opened = torch.sigmoid(1 + 2 * a.diff_alpha).sum()
        group = torch.sigmoid(1 + 2 * a.diff_group_alpha).item() if structured else 1.0
        expected += 0.25 * opened.item() * group
    assert model.penalty().item() == pytest.approx(expected)
    torch.manual_seed(1)
    drawn = adapters[0].init_alpha + adapters[0].speed * adapters[0].diff_alpha.detach()[0, 0]
    u = torch.rand(20000, dtype=torch.float64)
    share = ((u.log() - (1 - u).log() + drawn).sigmoid() * 3 - 1.5 > 0).double().mean()
    assert share.item() == pytest.approx(torch.sigmoid(drawn).item(), abs=0.02)
    model.penalty().backward()
    assert all(a.diff_alpha.grad.min() > 0 and a.diff_w.grad is None for a in adapters)
    assert adapted(l0_weight=0.0)[0].penalty() is None


def test_it_starts_as_the_base_with_open_gates():
    model, _, adapters = adapted(shake=False, init_alpha=5.0)
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(model(x), base()(x))
    assert torch.equal(adapters[0].gates(), torch.ones(6, 8, dtype=torch.float64))
    assert model.get_nb_trainable_parameters()[0] == 2 * (48 + 24) + 2


def trained(density: float = 0.25, steps: int = 8, **options):
    model, _, adapters = adapted(shake=False, density=density, **options)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    torch.manual_seed(2)
    x = torch.randn(16, 8, dtype=torch.float64)
    history = []
    for _ in range(steps):
        loss = (model(x) - x[:, :4]).square().mean() + (model.penalty() or 0.0)
        loss.backward()
        optimizer.step()
        model.after_step()
        optimizer.zero_grad()
        history.append([a.delta().detach().clone() for a in adapters])
    return model.eval(), adapters, history


def test_after_the_prune_step_the_largest_of_all_layers_are_left():
    torch.manual_seed(0)
    model, _, adapters = adapted(density=0.25)
    deltas = [a.delta().detach() for a in adapters]
    joined = torch.cat([delta.flatten() for delta in deltas])
    threshold = joined.abs().sort(descending=True).values[round(0.25 * len(joined)) - 1]
    for _ in range(5):
        assert all(a.kept is None for a in adapters)
        model.after_step()
    for a, before in zip(adapters, deltas):
        assert_close(a.delta(), torch.where(before.abs() >= threshold, before, 0.0))
    assert sum(len(a.kept) for a in adapters) == round(0.25 * 72)
    assert model.peft_config["default"].kept == {"first": len(adapters[0].kept), "second": len(adapters[1].kept)}
    assert model.penalty() is None


def test_what_is_left_goes_on_training_alone():
    _, adapters, history = trained()
    places = [delta != 0 for delta in history[4]]
    assert sum(int(place.sum()) for place in places) == 18
    for a, place, before, after in zip(adapters, places, history[4], history[-1]):
        assert torch.equal(after[~place], torch.zeros_like(after[~place]))
        assert (after[place] != before[place]).all() and len(a.kept) == int(place.sum())


def test_a_file_holds_what_is_left(tmp_path):
    model, adapters, _ = trained()
    x = torch.randn(5, 8, dtype=torch.float64)
    model.save_pretrained(tmp_path)
    kept = sum(len(a.kept) for a in adapters)
    tensors = model.adapter_tensors("default")
    assert {key.rpartition(".")[2] for key in tensors} == {"diff_indices", "diff_values"}
    assert sum(tensor.numel() for tensor in tensors.values()) == 2 * kept
    loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert_close(loaded(x), model(x), rtol=1e-12, atol=1e-12)
    assert loaded.get_nb_trainable_parameters()[0] == kept
    loaded(x).sum().backward()
    assert all((p.grad != 0).all() for p in loaded.parameters() if p.requires_grad)  # perhaps none is left of a layer
    loaded.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(base(), tmp_path / "again")
    assert torch.equal(again(x), loaded(x))
    assert_close(loaded.merge_and_unload()(x), model(x), rtol=1e-12, atol=1e-12)


def test_before_it_is_decided_a_file_holds_gates_and_all_entries(tmp_path):
    model, _, _ = trained(steps=3)
    x = torch.randn(5, 8, dtype=torch.float64)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(loaded(x), model(x)) and loaded.peft_config["default"].kept == {}


def test_a_training_that_was_interrupted_goes_on_with_the_same_entries():
    from deltatune.schedule import pack, unpack

    for steps in (3, 7):
        model, adapters, _ = trained(steps=steps)
        other, _, others = adapted(shake=False, density=0.25)
        for mine, theirs in zip(adapters, others):
            theirs.load_state_dict(mine.state_dict())
        unpack(other.base_model.schedules, *pack(model.base_model.schedules))
        x = torch.randn(5, 8, dtype=torch.float64)
        assert torch.equal(other(x), model(x))
        assert other.peft_config["default"].kept == model.peft_config["default"].kept


def test_a_grouped_convolution_stays_in_its_groups():
    torch.manual_seed(0)
    conv = nn.Conv1d(4, 6, 2, groups=2)
    config = DiffPruningConfig(prune_step=1, init_alpha=1.0, target_modules=["layer"])
    model = get_peft_model(nn.ModuleDict({"layer": conv}).double().eval(), config)
    layer = model.get_base_model()["layer"]
    nn.init.normal_(layer.adapters["default"].diff_w)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    out = layer(x)
    model.base_model.merge_adapter()
    assert_close(layer.base_layer(x), out)


@pytest.mark.parametrize(
    "options", [{"prune_step": None}, {"prune_step": 0}, {"density": 0.0}, {"density": 1.5}, {"l0_weight": -1.0},
                {"alpha_speed": 0.0}], ids=str,
)  # fmt: skip
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        DiffPruningConfig(**{"prune_step": 3, **options})
