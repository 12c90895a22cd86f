"""An adapter in the place of another of its method does what it does alone, in the same tensors."""

from pathlib import Path

import pytest
import torch

from deltatune import PeftModel
from deltatune.hotswap import hotswap_adapter
from tests.laws.examples import BASES, Case, Holder, cases, move


@pytest.mark.parametrize("case", cases())
def test_a_swapped_adapter_acts_as_a_loaded_one(case: Case, tmp_path: Path):
    model, other, x = case.model(), case.model(moved=False), case.batch()
    torch.manual_seed(7)
    move(other)
    other.save_pretrained(tmp_path)
    model.set_adapter("default", inference_mode=True)
    before, parameters = model(x), list(model.parameters())
    hotswap_adapter(model, tmp_path, "default")
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Holder(BASES[case.base].make()).eval(), tmp_path)
    assert not torch.equal(before, model(x))
    torch.testing.assert_close(model(x), again(x), rtol=1e-6, atol=1e-6)
