"""Copies of an adapted model are equal and independent."""

import copy
import io
import pickle

import pytest
import torch

from tests.laws.examples import Case, adapters, cases

KINDS = ("linear", "transposed", "embedding", "conv2d-circular", "norm")


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("clone", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("case", cases(KINDS, options=False))
def test_a_clone_is_equal_and_independent(case: Case, clone):
    model = case.model()
    model.add_adapter("other", case.config())
    x = case.batch()
    expected = model(x)
    made = clone(model)
    assert torch.equal(made(x), expected)

    with torch.no_grad():
        for parameter in adapters(made):
            parameter.add_(1.0)
    changed = made(x)
    assert torch.equal(model(x), expected) and not torch.equal(changed, expected)
    made.set_adapter("other")
    assert model.active_adapters == ["default"] and torch.equal(model(x), expected)
    with made.disable_adapter():
        assert torch.equal(model(x), expected)
    made.disable_adapter_layers()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("case", cases(("linear",), options=False))
def test_a_clone_made_inside_of_a_call_starts_outside_of_it(case: Case):
    model = case.model()
    x = case.batch()
    expected = model(x)
    with model.disable_adapter():
        made = copy.deepcopy(model)
    assert torch.equal(made(x), expected)


@pytest.mark.parametrize("clone", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("case", cases(("linear", "transposed"), options=False, weights=True))
def test_a_clone_of_a_merged_model_can_be_unmerged(case: Case, clone):
    model = case.model()
    x = case.batch()
    apart = model(x)
    model.base_model.merge_adapter()
    made = clone(model)
    model.base_model.unmerge_adapter()
    made.base_model.unmerge_adapter()
    assert torch.equal(made(x), apart) and torch.equal(model(x), apart)


@pytest.mark.parametrize("clone", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("case", cases(("linear",), options=False))
def test_a_single_wrapped_layer_can_be_cloned(case: Case, clone):
    model = case.model()
    x = case.batch()
    layer = model.get_base_model().layer
    assert torch.equal(clone(layer)(x), layer(x))
