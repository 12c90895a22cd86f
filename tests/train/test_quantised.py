"""A run on a base in 4 or 8 bits: it learns, goes on bit for bit, and is refused where it cannot."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deltatune.bases import as_map
from deltatune.bases.packed import PackedLinear
from deltatune.errors import ConfigError, MergeError
from deltatune.generate.load import load_ready
from deltatune.inject import adapted_layers
from deltatune.ship.merge import merge_to_folder
from deltatune.train import TrainSettings, train
from deltatune.train.base import load_base
from deltatune.train.run import checkpoints

BITS = ["load_in_4bit", "load_in_8bit"]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def packed(model: Any) -> int:
    return sum(
        isinstance(as_map(layer.base_layer), PackedLinear) for _, layer in adapted_layers(model.get_base_model())
    )


@needs_bitsandbytes
@pytest.mark.parametrize("field", BITS)
def test_the_base_is_quantised_and_the_run_learns(settings: Any, field: str):
    result = train(settings("causal", max_steps=12, logging_steps=1, **{field: True}))
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert packed(result.model) > 0
    assert json.loads((result.output_dir / "settings.json").read_text())[field] is True


@needs_bitsandbytes
@pytest.mark.parametrize("field", BITS)
def test_the_head_of_a_classifier_stays_whole_and_trains(settings: Any, field: str):
    result = train(settings("classification", **{field: True}))
    assert packed(result.model) > 0
    heads = [(n, p) for n, p in result.model.named_parameters() if "classifier" in n and "weight" in n]
    assert any(p.requires_grad for _, p in heads)
    assert all(p.dtype == torch.float32 for _, p in heads)


@needs_bitsandbytes
@pytest.mark.parametrize("field", BITS)
def test_a_resumed_run_ends_where_the_whole_one_does(settings_into: Any, tmp_path: Path, field: str):
    whole = train(settings_into(tmp_path / "whole", "causal", save_steps=2, **{field: True}))
    broken = settings_into(tmp_path / "broken", "causal", save_steps=2, **{field: True})
    train(broken)
    source = checkpoints.folder_of(tmp_path / "broken", 2)
    resumed = train(broken.model_copy(update={"resume_from_checkpoint": str(source)}))
    assert resumed.resumed_from == source
    ends = [{n: p for n, p in r.model.named_parameters() if p.requires_grad} for r in (whole, resumed)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@needs_bitsandbytes
def test_an_evaluation_leaves_the_layers_as_they_were(settings: Any):
    """On a CPU with bfloat16 instructions bitsandbytes would rearrange them, and widths like 16 cannot be."""
    base = load_base(settings("causal", load_in_4bit=True)).model.eval()
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    with torch.no_grad():
        base(input_ids=torch.tensor([[3, 4, 5]]))
    after = dict(base.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)


@needs_bitsandbytes
def test_answering_loads_the_base_as_the_run_had_it_and_merging_needs_the_stored_one(
    settings: Any, bases: dict[str, Path], tmp_path: Path
):
    train(settings("causal", load_in_4bit=True))
    adapter = str(tmp_path / "out")
    assert packed(load_ready(adapter).model) > 0
    with pytest.raises(MergeError, match=r"trained with load_in_4bit.*--model "):
        merge_to_folder(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    made = merge_to_folder(adapter, tmp_path / "merged", model=str(bases["causal"]))
    assert made.proof is not None and made.dtype == "float32"


def test_what_cannot_start_is_refused_before_anything_is_loaded(
    settings: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    refused = {
        "cannot be trained in full": settings("causal", method="full", load_in_8bit=True),
        "is not loaded from files": settings("seq2seq", model_name_or_path="demo", load_in_4bit=True),
    }
    for told, wrong in refused.items():
        with pytest.raises(ConfigError, match=told):
            train(wrong)
    with pytest.raises(ConfigError, match="given in memory"):
        base = load_base(settings("causal"))
        train(settings("causal", load_in_4bit=True), model=base.model, tokenizer=base.tokenizer)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None)
    with pytest.raises(ConfigError, match="bitsandbytes is not installed; pip install bitsandbytes"):
        train(settings("causal", load_in_4bit=True))
    assert not list(tmp_path.glob("out/*.json"))


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"quantization_bit": 4}, "load_in_4bit"),
        ({"quantization": "int4"}, "load_in_4bit"),
        ({"quantize": "bnb.nf4"}, "load_in_4bit"),
        ({"quant_bits": 8}, "load_in_8bit"),
        ({"quantize": "none"}, None),
    ],
)
def test_other_programs_names_are_understood(given: dict[str, Any], field: str | None):
    made = TrainSettings(**given)
    assert [name for name in BITS if getattr(made, name)] == ([] if field is None else [field])


def test_both_and_unknown_widths_are_refused():
    with pytest.raises(ConfigError, match="load_in_8bit=True is not allowed, expected false beside load_in_4bit"):
        TrainSettings(load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(ConfigError, match="quantization_bit=3 is not allowed, expected 4 or 8"):
        TrainSettings(quantization_bit=3)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_packed_weights_count_as_the_numbers_they_hold(bits: str, settings: Any, tmp_path: Path):
    """In print_trainable_parameters, the status, metrics and the map of the report; and as PEFT counts them."""
    from peft import LoraConfig as TheirConfig
    from peft import get_peft_model as their_model

    from deltatune import LoraConfig, get_peft_model
    from deltatune.report.sites import adapter_map

    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
    whole = get_peft_model(load_base(settings("causal")).model, LoraConfig(**options))
    model = get_peft_model(load_base(settings("causal", **{bits: True})).model, LoraConfig(**options))
    theirs = their_model(load_base(settings("causal", **{bits: True})).model, TheirConfig(**options))
    counted = whole.get_nb_trainable_parameters()
    assert counted[1] == sum(parameter.numel() for parameter in whole.parameters())
    assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters() == counted
    status = model.get_model_status()
    assert (status.trainable_params, status.total_params) == counted
    drawn, plain = adapter_map(model), adapter_map(whole)
    assert (drawn.trained, drawn.parameters) == counted
    assert [stack.rows for stack in drawn.stacks] == [stack.rows for stack in plain.stacks]
    result = train(settings("causal", max_steps=1, **{bits: True}))
    alone = train(settings("causal", max_steps=1, output_dir=str(tmp_path / "whole")))
    assert result.metrics["total_parameters"] == alone.metrics["total_parameters"]
