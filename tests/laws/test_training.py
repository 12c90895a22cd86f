"""What trains: exactly the adapter. Everything else stays as it was, to the bit."""

import pytest
import torch

from deltatune.adapter import Stored
from tests.laws.examples import Case, adapters, base_values, cases, move, same


def step(model, case: Case, lr: float = 0.1) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
    model(case.batch()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("case", cases())
def test_exactly_the_adapter_trains_and_each_of_its_parameters_receives_gradient(case: Case):
    model = case.model()
    own = adapters(model)
    trains = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trains} == {id(p) for p in own} and len(own) == len({id(p) for p in own})
    declared = model.get_base_model().layer.adapters["default"].learns_in_eval
    if declared is not True:
        model(case.batch(8)).square().mean().backward()
        assert any(p.grad is None for p in own), f"declared as {declared!r}, but all receive gradient"
        model.train()
    model(case.batch(8)).square().mean().backward()
    for parameter in (p for p in own if p.numel()):  # an option may leave one empty
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("case", cases())
def test_training_lowers_the_loss_and_does_not_touch_the_base(case: Case):
    model = case.model(moved=False)
    x = case.batch(16)
    goal = torch.randn_like(model(x))
    before, start = base_values(model), [p.detach().clone() for p in adapters(model)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(5):
        loss = (model(x) - goal).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert same(base_values(model), before)
    assert any(not torch.equal(p, old) for p, old in zip(adapters(model), start))


@pytest.mark.parametrize("case", cases(options=False))
def test_the_count_is_that_of_the_file(case: Case):
    model = case.model()
    trainable, total = model.get_nb_trainable_parameters()
    kept = [part.kept_tensors() for part in model.modules() if isinstance(part, Stored)]
    frozen = sum(tensor.numel() for tensors in kept for tensor in tensors.values())
    assert trainable + frozen == sum(tensor.numel() for tensor in model.adapter_tensors("default").values())
    assert total == trainable + sum(tensor.numel() for tensor in base_values(model).values())


@pytest.mark.parametrize("case", cases(("linear", "conv2d-circular"), options=False))
def test_training_one_adapter_changes_neither_the_base_nor_another(case: Case):
    model = case.model()
    model.add_adapter("other", case.config())
    move(model, name="other")
    x = case.batch()
    model.set_adapter("other")
    other = model(x)
    with model.disable_adapter():
        base = model(x)
    model.set_adapter("default")
    first = model(x)
    step(model, case)
    assert not torch.equal(model(x), first)
    assert all(p.grad is None for p in adapters(model, "other"))
    model.set_adapter("other")
    assert torch.equal(model(x), other)
    with model.disable_adapter():
        assert torch.equal(model(x), base)


@pytest.mark.parametrize("case", cases(("linear",), options=False))
def test_what_trains_follows_the_active_adapter(case: Case):
    model = case.model()
    model.add_adapter("other", case.config())
    assert not any(p.requires_grad for p in adapters(model, "other"))
    model.set_adapter("other")
    assert all(p.requires_grad for p in adapters(model, "other"))
    assert not any(p.requires_grad for p in adapters(model))
    model.set_adapter(["default", "other"])
    assert all(p.requires_grad for p in [*adapters(model), *adapters(model, "other")])
    model.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
