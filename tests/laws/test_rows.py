"""Row i of a mixed batch equals that row alone with its adapter."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import get_peft_model
from deltatune.errors import AdapterNameError, StateError
from tests.laws.examples import BASES, Case, Holder, cases, config_of, move, pairs

ROWS = ["default", "__base__", "other", "default", "other", "__base__"]


@pytest.mark.parametrize("case", cases())
def test_a_mixed_batch_equals_its_rows_alone(case: Case):
    model = case.model()
    model.add_adapter("other", case.config())
    move(model, name="other")
    x = case.batch(len(ROWS))
    mixed = model(x, adapter_names=ROWS)
    alone = torch.empty_like(mixed)
    for index, name in enumerate(ROWS):
        if name == "__base__":
            with model.disable_adapter():
                alone[index] = model(x[index : index + 1])[0]
        else:
            model.set_adapter(name)
            alone[index] = model(x[index : index + 1])[0]
    assert_close(mixed, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed, model(x))


@pytest.mark.parametrize("case", cases(("linear", "block"), options=False))
def test_rows_of_many_adapters_equal_each_alone(case: Case):
    model = case.model()
    for name in ("b", "c", "d"):
        model.add_adapter(name, case.config())
        move(model, name=name)
    rows = ["b", "d", "__base__", "c", "default", "b", "b", "d"]
    x = case.batch(len(rows))
    mixed = model(x, adapter_names=rows)
    for row, name in enumerate(rows):
        alone = model(x[row : row + 1], adapter_names=[name])
        assert_close(mixed[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first,second", pairs("rows"))
def test_rows_may_use_different_methods(first, second):
    torch.manual_seed(0)
    model = get_peft_model(Holder(nn.Linear(12, 8)).eval(), config_of(first))
    model.add_adapter("other", config_of(second))
    move(model), move(model, name="other")
    x = BASES["linear"].batch(2)
    mixed = model(x, adapter_names=["default", "other"])
    model.set_adapter("default")
    assert_close(mixed[0], model(x[:1])[0])
    model.set_adapter("other")
    assert_close(mixed[1], model(x[1:])[0])


@pytest.mark.parametrize("case", cases(("linear",), options=False))
def test_rows_train_their_own_adapter(case: Case):
    model = case.model()
    model.add_adapter("other", case.config())
    move(model, name="other")
    model.set_adapter(["default", "other"])
    model(case.batch(2), adapter_names=["default", "__base__"]).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all((grad is None) == (".other" in name) for name, grad in grads.items())


@pytest.mark.parametrize("case", cases(("linear",), options=False))
def test_wrong_rows_are_refused(case: Case):
    model = case.model()
    x = case.batch(2)
    expected = model(x)
    with pytest.raises(StateError, match="3 names for a batch of 2 rows"):
        model(x, adapter_names=["default"] * 3)
    with pytest.raises(AdapterNameError, match="nowhere"):
        model(x, adapter_names=["default", "nowhere"])
    if case.mergeable:
        model.base_model.merge_adapter()
        with pytest.raises(StateError, match="unmerge_adapter"):
            model(x, adapter_names=["default", "__base__"])
        model.base_model.unmerge_adapter()
    assert torch.equal(model(x), expected)
