"""The rules that make one tensor of several, beside PEFT's and beside their definitions."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from deltatune import combine
from deltatune.errors import MergeError

NAMES = ("task_arithmetic", "magnitude_prune", "ties", "dare_linear", "dare_ties")


def tensors(count: int = 3, *shape: int) -> list[torch.Tensor]:
    torch.manual_seed(4)
    return [torch.randn(shape or (7, 5)) for _ in range(count)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("density", [0.3, 0.75])
def test_they_are_pefts_in_name_arguments_and_result(name: str, density: float):
    theirs = pytest.importorskip("peft.utils.merge_utils")
    ours, other = getattr(combine, name), getattr(theirs, name)
    arguments = list(inspect.signature(other).parameters)
    assert list(inspect.signature(ours).parameters)[: len(arguments)] == arguments
    given: dict[str, Any] = {"density": density} if "density" in arguments else {}
    for method in ("total", "frequency") if "majority_sign_method" in arguments else (None,):
        given |= {} if method is None else {"majority_sign_method": method}
        found = []
        for function in (ours, other):
            torch.manual_seed(9)
            found.append(function(tensors(), torch.tensor([0.5, -1.0, 2.0]), **given))
        assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


def test_ties_is_the_papers_trim_elect_and_mean():
    rows = [torch.tensor([3.0, -2.0, 0.1, 1.0]), torch.tensor([-1.0, -4.0, 0.2, 5.0])]
    # kept of each are the two largest: 3, -2 | -4, 5; elected are the signs of the sums 3, -6, 0, 5
    assert combine.ties(rows, [1.0, 1.0], 0.5).tolist() == [3.0, -3.0, 0.0, 5.0]


def test_dare_is_the_sum_in_expectation_and_follows_its_generator():
    given, generator = tensors(2), torch.Generator().manual_seed(0)
    draws = torch.stack([combine.dare_linear(given, [1.0, -1.0], 0.5, generator) for _ in range(4000)])
    assert_close(draws.mean(0), given[0] - given[1], rtol=0, atol=0.15)
    again = combine.dare_linear(given, [1.0, -1.0], 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(draws[0], again)


def test_pruning_keeps_exactly_the_largest_share():
    (tensor,) = tensors(1, 10, 10)
    kept = combine.prune(tensor, 0.37, "magnitude")
    assert (kept != 0).sum() == 37 and kept.abs()[kept != 0].min() >= tensor.abs()[kept == 0].max()
    assert torch.equal(combine.prune(tensor, 1.0, "magnitude"), tensor)
    assert not combine.prune(tensor, 0.0, "magnitude").any()


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan"), None, "half", True])
def test_a_density_that_is_no_share_is_refused(density: Any):
    with pytest.raises(MergeError, match="density=") as caught:
        combine.magnitude_prune(tensors(), [1, 1, 1], density)
    assert caught.value.field == "density"


def test_other_arguments_that_make_no_sense_are_named():
    with pytest.raises(MergeError, match="density=0"):
        combine.dare_linear(tensors(), [1, 1, 1], 0)
    with pytest.raises(MergeError, match="2 weights for 3 tensors"):
        combine.task_arithmetic(tensors(), [1, 1])
    with pytest.raises(MergeError, match="majority_sign_method"):
        combine.ties(tensors(), [1, 1, 1], 0.5, "loudest")
    with pytest.raises(MergeError, match="method="):
        combine.prune(tensors()[0], 0.5, "smallest")
