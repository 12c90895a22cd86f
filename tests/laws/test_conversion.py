"""Conversion: an adapter that a weight can hold is a LoRA adapter of some rank, whose factors it may have at hand."""

from pathlib import Path

import pytest
import torch
from torch import nn

from deltatune import PeftModel, save_as_lora
from tests.laws.examples import BASES, Case, Holder, cases


@pytest.mark.parametrize("case", [case for case in cases() if case.values[0].mergeable])
def test_the_factors_of_a_method_are_its_change_of_the_weight(case: Case):
    layer = case.model(torch.float64).get_base_model().layer
    adapter, base = layer.adapters["default"], layer.as_map()
    with torch.no_grad():
        factors = adapter.low_rank(base)
        if factors is None:
            return
        up, down = factors
        assert up.shape == (base.out_features, len(down)) and down.shape[1] == base.in_features
        change = adapter.adapt(base.weight) - base.weight
        torch.testing.assert_close(up @ down, change, rtol=1e-9, atol=1e-9 * change.abs().max().item())


def _holdable(case: Case) -> bool:
    """LoRA is none for norms."""
    return case.has_weight and not isinstance(BASES[case.base].make(), (nn.LayerNorm, nn.RMSNorm))


@pytest.mark.filterwarnings("ignore::deltatune.PeftWarning")
@pytest.mark.parametrize("case", [case for case in cases() if _holdable(case.values[0])])
def test_every_method_becomes_lora_with_the_same_outputs(case: Case, tmp_path: Path):
    model = case.model()
    layer, x = model.get_base_model().layer, case.batch()
    errors = save_as_lora(tmp_path, model, None, max_error=1e-5)
    assert set(errors) == {"layer"} and errors["layer"] <= 2e-5
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Holder(BASES[case.base].make()).eval(), tmp_path)
    assert (again(x) - model(x)).norm() <= 1e-4 * model(x).norm()
    change = layer.as_map(["default"]).weight - layer.as_map().weight
    held = again.get_base_model().layer
    got = held.as_map(["default"]).weight - held.as_map().weight
    assert (got - change).norm() <= 1e-4 * change.norm() + 1e-6
