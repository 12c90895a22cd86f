"""The benchmark of text and chat: its parts share no passage, its base is the untouched one, its cells are drawn."""

from __future__ import annotations

from dataclasses import replace

import decoders
import pytest
from harness import stories
from harness.cells import Cell, Store
from harness.progress import Line

TINY = {
    "train_rows": 8, "dev_rows": 3, "test_rows": 3, "test_records": 3, "max_steps": 2,
    "per_device_train_batch_size": 2, "max_length": 200,
}  # fmt: skip
STUDIES = decoders.studies(quick=True)


def tiny(label):
    study = next(study for study in STUDIES if study.label == label)
    budget = {name: value for name, value in TINY.items() if name in study.spec.budget}
    return replace(study, spec=replace(study.spec, budget={**study.spec.budget, **budget}))


def test_every_trained_method_gets_four_values_three_seeds_and_the_same_budget():
    for task in decoders.TASKS:
        mine = [study for study in decoders.studies() if study.spec.task == task and study.spec.method != "base"]
        assert [(len(study.grid), len(study.seeds)) for study in mine] == [(4, 3)] * 3
        assert all(study.spec.budget == mine[0].spec.budget for study in mine)


def test_no_passage_is_in_two_parts(shared_data):
    parts = [{row["text"] for row in stories.passages(part, 10**6)} for part in ("train", "dev", "test")]
    assert all(parts) and not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert sum(map(len, parts)) > 2300


@pytest.mark.parametrize("label", ["causal/base", "causal/prefix", "chat/base", "chat/lora"])
def test_a_cell_is_trained_scored_and_drawn(label, tmp_path, shared_data):
    study = tiny(label)
    (spec,) = study.tries()
    result = decoders.run(spec, tmp_path / "work", Line("test"))
    assert {name for name, _ in decoders.TASKS[spec.task].scores} <= set(result["test"])
    assert ("dev" in result) == (spec.method != "base")
    store = Store(tmp_path / "cells")
    store.put(Cell(spec, result, {"machine": "m", "cores": 2, "threads": 1, "torch": "2", "load": [1.0, 1.0]}))
    page = decoders.render([study if s.label == label else s for s in STUDIES], store)
    assert f"| {decoders.NAMES[spec.method]} |" in page
    assert ("- the untouched base: " in page) == (label == "chat/base")


def test_the_base_is_scored_as_it_is(tmp_path, shared_data):
    """The loss that transformers computes on the same rows, one by one, summed over their tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (spec,) = tiny("causal/base").tries()
    told = decoders.run(spec, tmp_path / "work", Line("test"))["test"]["loss"]
    folder = stories.stories_folder()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for row in stories.passages("test", spec.budget["test_rows"]):
        whole = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]  # an end is learnt too
        ids = torch.tensor([whole[: spec.budget["max_length"]]])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert told == pytest.approx(total / count, rel=1e-4)
