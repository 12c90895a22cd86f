"""Half precision under float32 adapters: no tensor in single precision that grows with the batch waits for backward.

A copy of the activations in float32 would be twice the activations, for every adapted layer. (PEFT keeps one.) The
trainable tensors are small and are cast down instead, their gradients cast up; see `tests/core/test_precision.py`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.laws.examples import BASES, SWEPT, Case, cases

WIDE = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def kept(model: torch.nn.Module, x: Tensor) -> int:
    """Bytes in single precision or wider that the forward pass keeps for the backward pass, each storage once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}  # the tensors themselves, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own and tensor.dtype in WIDE:
            found[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("case", cases(SWEPT))
def test_no_activation_is_kept_in_single_precision(case: Case):
    model = case.model(torch.bfloat16).train()
    if model.get_base_model().layer.adapters["default"].reads:
        pytest.skip("it mixes its factors for every row, which is more than a number per feature here")
    floats = BASES[case.base].rows is None
    sizes = [kept(model, case.batch(size, torch.bfloat16).requires_grad_(floats)) for size in (64, 128)]
    assert sizes[1] <= sizes[0]
