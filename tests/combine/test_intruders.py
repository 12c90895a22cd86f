"""Intruder dimensions are found and made smaller as PEFT does it."""

import copy
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from deltatune import IA3Config, PeftModel, reduce_intruder_dimension
from deltatune.errors import AdapterNameError, ConfigError, MergeError
from tests.combine.models import IDS, LAYERS, deltas, lora, with_adapters
from tests.core.tiny import tiny
from tests.peer.pairs import peft, saved_by_peft, scatter

OPTIONS = {"top_k": 6, "threshold_epsilon": 0.8, "mitigation_lambda": 0.4}


@pytest.mark.filterwarnings("ignore")
def test_the_new_adapter_changes_the_weight_as_that_of_peft(tmp_path: Path):
    from peft.tuners.lora.intruders import reduce_intruder_dimension as theirs_do

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    theirs = scatter(peft.get_peft_model(tiny("llama"), config), 5)
    ours = PeftModel.from_pretrained(tiny("llama"), saved_by_peft(theirs, tmp_path))
    theirs_do(theirs, new_adapter_name="new", logging_sink=None, **OPTIONS)
    counts = reduce_intruder_dimension(ours, new_adapter_name="new", logging_sink=None, **OPTIONS)
    assert sum(counts.values()) > 3
    for path, delta in deltas(ours, "new").items():
        layer, mine = (model.get_base_model().get_submodule(path) for model in (theirs, ours))
        assert_close(delta, layer.get_delta_weight("new").detach(), rtol=1e-4, atol=1e-5)
        for side in ("lora_A", "lora_B"):  # of equal size, up to signs of singular vectors
            mine_norm, norm = (getattr(part, side)["new"].weight.norm() for part in (mine, layer))
            assert_close(mine_norm, norm, rtol=1e-4, atol=1e-5)


def test_it_is_the_papers_equation_on_every_kind_of_layer():
    model = with_adapters({"default": lora(2, 5)})
    before = deltas(model, "default")
    lines: list[str] = []
    counts = reduce_intruder_dimension(model, top_k=3, threshold_epsilon=0.9, logging_sink=lines.append)
    assert model.active_adapters == ["intruder_reduced"] and len(lines) == len(LAYERS) + 1
    assert any(counts.values())
    for path, delta in deltas(model, "intruder_reduced").items():
        if path == "grouped":
            continue  # its groups are brought down to the rank by themselves
        W = model.get_base_model().get_submodule(path).as_map().weight.detach()
        bases = torch.linalg.svd(W, full_matrices=False).U
        U, S, V = torch.linalg.svd(W + before[path], full_matrices=False)
        change = before[path].clone()
        for i in range(3):
            if (U[:, i] @ bases).abs().max() < 0.9:
                change -= 0.25 * S[i] * torch.outer(U[:, i], V[i])
        P, T, Q = torch.linalg.svd(change, full_matrices=False)
        assert_close(delta, (P[:, :2] * T[:2]) @ Q[:2], rtol=1e-4, atol=1e-5)


def test_without_intruders_the_adapter_is_copied_with_all_it_has():
    model = with_adapters({"default": lora(targets=["linear"], lora_bias=True, modules_to_save=["head"])})
    torch.nn.init.normal_(model.get_base_model().head.modules_to_save["default"].weight)
    expected = model(IDS)
    assert reduce_intruder_dimension(model, threshold_epsilon=0.0, logging_sink=None) == {"linear": 0}
    assert torch.equal(model(IDS), expected)


def test_a_refused_call_changes_nothing():
    model = with_adapters({"default": lora(), "ia3": IA3Config(target_modules=["linear"], feedforward_modules=[])})
    before = copy.deepcopy(list(model.peft_config))
    with pytest.raises(MergeError, match="no LoRA adapter"):
        reduce_intruder_dimension(model, "ia3")
    with pytest.raises(MergeError, match="there already"):
        reduce_intruder_dimension(model, new_adapter_name="ia3")
    with pytest.raises(AdapterNameError, match="nobody"):
        reduce_intruder_dimension(model, "nobody")
    with pytest.raises(ConfigError, match="top_k"):
        reduce_intruder_dimension(model, top_k=0)
    assert list(model.peft_config) == before and model.active_adapters == ["default"]
