"""AdaLoRA against arXiv 2303.10512: W' = W + P diag(E) Q, and ranks given away by (7) to (12)."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import AdaLoraConfig, PeftModel, get_peft_model
from deltatune.errors import ConfigError, PeftWarning, StateError


class Net(nn.Module):
    """Two layers, and a loss as transformers' models give it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted(shake: bool = True, **options):
    torch.manual_seed(0)
    options = {"target_modules": ["first", "second"], "init_r": 3, "target_r": 1, "total_step": 20, **options}
    model = get_peft_model(Net().double(), AdaLoraConfig(**options))
    layers = [model.get_base_model().first, model.get_base_model().second]
    adapters = [layer.adapters["default"] for layer in layers]
    if shake:
        for adapter in adapters:
            for parameter in adapter.parameters():
                nn.init.normal_(parameter)
    return model, layers, adapters


def test_the_update_is_p_lambda_q_scaled_by_the_first_rank():
    _, layers, adapters = adapted(lora_alpha=5)
    layer, a = layers[0], adapters[0]
    update = sum(a.lora_E[i, 0] * torch.outer(a.lora_B[:, i], a.lora_A[i]) for i in range(3))
    expected = layer.base_layer.weight + 5 / (3 + 1e-5) * update
    assert_close(layer.stored_weight(["default"]), expected)
    x = torch.randn(7, 8, dtype=torch.float64)
    assert_close(layer(x), x @ expected.T + layer.base_layer.bias)


def test_it_trains_r_times_inputs_and_outputs_and_one():
    model, _, adapters = adapted()
    assert model.get_nb_trainable_parameters()[0] == 3 * (8 + 6 + 1) + 3 * (6 + 4 + 1)
    assert (
        adapters[0].lora_A.shape == (3, 8) and adapters[0].lora_B.shape == (6, 3) and adapters[0].lora_E.shape == (3, 1)
    )


def test_the_singular_values_start_at_zero_and_the_vectors_small():
    torch.manual_seed(0)
    model = get_peft_model(
        nn.ModuleDict({"first": nn.Linear(900, 800)}), AdaLoraConfig(total_step=9, target_modules=["first"])
    )
    adapter = model.get_base_model()["first"].adapters["default"]
    assert not adapter.lora_E.any()
    assert adapter.lora_A.std().item() == pytest.approx(0.02, rel=0.03)
    assert adapter.lora_B.std().item() == pytest.approx(0.02, rel=0.03)


def test_the_penalty_is_the_mean_distance_from_orthonormal_vectors():
    model, _, adapters = adapted(orth_reg_weight=0.3)
    eye = torch.eye(3, dtype=torch.float64)
    grams = [gram for a in adapters for gram in (a.lora_A @ a.lora_A.T, a.lora_B.T @ a.lora_B)]
    expected = 0.3 * sum(torch.sqrt(((gram - eye) ** 2).sum()) for gram in grams) / 4
    assert_close(model.penalty(), expected)
    model.penalty().backward()
    assert all(a.lora_A.grad.abs().min() > 0 and a.lora_E.grad is None for a in adapters)
    assert adapted(orth_reg_weight=0.0)[0].penalty() is None


def steps(model, optimizer, count, begin=1):
    """Steps of a hand-written loop, noting gradients and updated values before the schedule runs."""
    seen = []
    for step in range(begin, begin + count):
        torch.manual_seed(step)
        x = torch.randn(16, 8, dtype=torch.float64)
        loss = (model(x) - x[:, :4].roll(step % 2, 0)).square().mean() + model.penalty()
        loss.backward()
        optimizer.step()
        seen.append({n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters() if p.requires_grad})
        model.after_step()
        optimizer.zero_grad()
    return seen


def scores(seen, upto, beta1, beta2):
    """Equations (8) to (10) and (7), number by number: the importance of each triplet, layer by layer."""
    found = []
    for layer in ("first", "second"):
        total = 0
        for part, rows in (
            ("lora_E", lambda s: s[:, 0]),
            ("lora_A", lambda s: s.mean(1)),
            ("lora_B", lambda s: s.mean(0)),
        ):
            name = f"base_model.model.{layer}.{part}.default"
            mean = spread = 0.0
            for step in range(upto):
                value, grad = seen[step][name]
                now = (value * grad).abs()
                mean = beta1 * mean + (1 - beta1) * now
                spread = beta2 * spread + (1 - beta2) * (now - mean).abs()
            total = total + rows(mean * spread)
        found.append(total)
    return torch.cat(found)


def test_ranks_are_taken_away_as_the_equations_say():
    tinit, tfinal, total, every = 2, 5, 14, 3
    model, _, adapters = adapted(tinit=tinit, tfinal=tfinal, total_step=total, deltaT=every, beta1=0.7, beta2=0.6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    seen = []
    for step in range(1, total + 1):
        seen += steps(model, optimizer, 1, begin=step)
        E = torch.cat([a.lora_E[:, 0] for a in adapters])
        end = total - tfinal
        if step <= tinit or (step < end and step % every):
            assert (E != 0).all()
        else:
            left = max(1 - (step - tinit) / (end - tinit), 0)
            budget = math.floor(2 + (6 - 2) * left**3)
            at = min(step, end - 1)  # in the step that decides nothing is learned any more
            best = scores(seen, at, 0.7, 0.6).topk(budget).indices
            if step <= end:
                assert sorted(best.tolist()) == (E != 0).nonzero()[:, 0].tolist()
                decided = E != 0
            assert torch.equal(E != 0, decided)
    assert model.peft_config["default"].rank_pattern == {
        "first.lora_E": decided[:3].tolist(),
        "second.lora_E": decided[3:].tolist(),
    }


def pruned(**options):
    model, layers, adapters = adapted(total_step=6, tfinal=2, **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    steps(model, optimizer, 6)
    return model.eval(), layers, adapters, optimizer


def test_a_file_holds_the_ranks_that_are_left(tmp_path):
    model, _, adapters, _ = pruned()
    x = torch.randn(5, 8, dtype=torch.float64)
    model.save_pretrained(tmp_path)
    tensors = model.adapter_tensors("default")
    sizes = [sum(adapter.kept) for adapter in adapters]
    assert sum(sizes) == 2
    for name, size in zip(("first", "second"), sizes):
        assert tensors[f"base_model.model.{name}.lora_A"].shape[0] == size
    again = PeftModel.from_pretrained(Net().double(), tmp_path, allow_base_mismatch=True)
    again.get_base_model().load_state_dict(
        {k: v for k, v in model.get_base_model().state_dict().items() if "lora_" not in k}, strict=False
    )
    assert_close(again(x), model(x))
    assert again.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/adapter_model.safetensors").stat().st_size <= (
        tmp_path / "adapter_model.safetensors"
    ).stat().st_size + 64


def test_another_training_of_a_pruned_adapter_takes_from_what_is_left(tmp_path):
    model, *_ = pruned(target_r=2)
    first = model.peft_config["default"].rank_pattern
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net().double(), tmp_path, is_trainable=True, allow_base_mismatch=True)
    again.base_model.schedules["default"].target = 2
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=0.05)
    steps(again, optimizer, 6)
    second = again.peft_config["default"].rank_pattern
    assert sum(map(sum, second.values())) == 2
    assert all(was or not now for key in first for was, now in zip(first[key], second[key]))
    again.save_pretrained(tmp_path / "again")
    last = PeftModel.from_pretrained(again.unload(), tmp_path / "again")
    x = torch.randn(5, 8, dtype=torch.float64)
    assert_close(last(x), again(x))


def test_ties_leave_as_many_as_the_budget_says():
    model, _, adapters = adapted(shake=False, total_step=4, tfinal=1)
    for adapter in adapters:
        for parameter in adapter.parameters():
            nn.init.ones_(parameter)
            parameter.grad = torch.ones_like(parameter)
    for _ in range(3):
        model.after_step()
    assert sum(int((adapter.lora_E != 0).sum()) for adapter in adapters) == 2


def test_a_layer_without_gradient_loses_its_ranks_first():
    model, _, adapters = adapted(total_step=4, tfinal=1)
    for parameter in adapters[1].parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(3):
        model.after_step()
    assert not adapters[0].lora_E.any() and int((adapters[1].lora_E != 0).sum()) == 2


def test_no_rank_is_taken_where_the_target_is_the_first_rank():
    model, _, adapters = adapted(target_r=3, total_step=4, tfinal=1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    steps(model, optimizer, 4)
    assert all((adapter.lora_E != 0).all() for adapter in adapters)


def test_a_single_step_ends_at_the_target():
    model, _, adapters = adapted(total_step=1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    steps(model, optimizer, 1)
    assert sum(int((adapter.lora_E != 0).sum()) for adapter in adapters) == 2


def test_the_users_config_stays_as_it_was():
    config = AdaLoraConfig(target_modules=["first"], init_r=3, target_r=1, total_step=3)
    model = get_peft_model(Net().double(), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    steps(model, optimizer, 3)
    assert model.peft_config["default"].rank_pattern is not None and config.rank_pattern is None


def test_after_step_in_the_wrong_place_is_refused():
    model, _, _ = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(2, 8, dtype=torch.float64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(StateError, match=r"finds no gradients; call model.after_step\(\) after"):
        model.after_step()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"total_step": None}, "total_step=None"),
        ({"total_step": 0}, "total_step=0"),
        ({"total_step": 10, "tinit": 6, "tfinal": 4}, "tinit=6.*less than total_step - tfinal = 6"),
        ({"deltaT": 0}, "deltaT=0"),
        ({"beta1": 1.0}, r"beta1=1\.0"),
        ({"beta2": 0.0}, r"beta2=0\.0"),
        ({"orth_reg_weight": -0.1}, r"orth_reg_weight=-0\.1"),
        ({"target_r": 0}, "target_r=0"),
        ({"use_dora": True}, "use_dora=True"),
        ({"rank_pattern": {"first.lora_E": [True]}}, r"rank_pattern.*init_r=12"),
        ({"rank_pattern": {"first": 4}}, "rank_pattern"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_field(options, named):
    with pytest.raises(ConfigError, match=named):
        AdaLoraConfig(**{"total_step": 20, **options})


def test_options_without_effect_are_told():
    with pytest.warns(PeftWarning, match="r=16 is not used; init_r=12"):
        get_peft_model(nn.Sequential(nn.Linear(20, 20)), AdaLoraConfig(r=16, total_step=9, target_modules=["0"]))
    with pytest.warns(PeftWarning, match="target_r=8 is more than init_r=4"):
        get_peft_model(nn.Sequential(nn.Linear(20, 20)), AdaLoraConfig(init_r=4, total_step=9, target_modules=["0"]))


def test_a_copy_follows_its_own_schedule():
    model, _, _ = adapted(total_step=3)
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.1)
    steps(other, optimizer, 3)
    assert model.peft_config["default"].rank_pattern is None and other.peft_config["default"].rank_pattern is not None
    assert all((layer.adapters["default"].lora_E != 0).all() for layer in (model.base_model.model.first,))


def test_the_state_of_the_schedule_comes_back():
    from deltatune.schedule import pack, unpack

    one, _, _ = adapted(total_step=9, tfinal=3)
    optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.01)
    steps(one, optimizer, 4)
    other, _, _ = adapted(total_step=9, tfinal=3)
    other.load_state_dict(one.state_dict())
    unpack(other.base_model.schedules, *pack(one.base_model.schedules))
    for model in (one, other):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        steps(model, optimizer, 5, begin=5)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))
    assert one.peft_config["default"].rank_pattern == other.peft_config["default"].rank_pattern is not None
