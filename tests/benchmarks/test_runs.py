"""A cell from rows to scores, on real text with toy models."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import classification
import e2e_nlg
import pytest
from harness.cells import Cell, Spec, Store
from harness.progress import Line

from deltatune.train import TrainingInterrupted
from tests.train import toys

TINY = {
    "train_rows": 48, "dev_rows": 8, "test_records": 6, "max_steps": 4, "per_device_train_batch_size": 4,
    "max_length": 32, "max_target_length": 8,
}  # fmt: skip


def spec_of(method, folder):
    options, grid = e2e_nlg.METHODS[method]
    hyper = {"model_name_or_path": str(folder), **options, **(e2e_nlg.SCHEDULE if grid else {})}
    hyper |= {"learning_rate": 1e-2} if grid else {}
    hyper |= {"candidates": 4} if method == "fixed" else {}
    return Spec("e2e_nlg", "e2e", method, 0, TINY, hyper, {})


def without_times(result):
    return {name: value for name, value in result.items() if name not in ("train_seconds", "generate_seconds")}


@pytest.mark.parametrize("method", list(e2e_nlg.METHODS))
def test_an_e2e_cell_is_trained_scored_and_sampled(method, tmp_path, shared_data):
    folder = toys.t5(tmp_path / "t5")
    result = e2e_nlg.run(spec_of(method, folder), tmp_path / "work", Line("test"))
    assert set(result["test"]) == {
        "bleu", "bleu_swapped", "rouge_l", "rouge_l_swapped", "slots", "slots_swapped", "distinct",
    }  # fmt: skip
    assert len(result["samples"]) == e2e_nlg.SHOWN
    if method in ("prefix", "lora", "full"):
        assert result["examples"] == 16 and result["steps"] == 4
        assert result["dev"]["loss"] > 0
        assert (result["trainable_parameters"] == result["all_parameters"]) == (method == "full")
    assert not (tmp_path / "work").exists()  # checkpoints are for stopped cells only


class Stopper(Line):
    """Stops the process's training as `kill` does, at one step."""

    def on_step(self, progress):
        if progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_cell_that_was_stopped_goes_on_to_the_result_it_would_have_had(tmp_path, shared_data):
    spec = spec_of("prefix", toys.t5(tmp_path / "t5"))
    whole = e2e_nlg.run(spec, tmp_path / "whole", Line("test"))
    with pytest.raises(TrainingInterrupted):
        e2e_nlg.run(spec, tmp_path / "work", Stopper("test"))
    assert [path.name for path in (tmp_path / "work").glob("checkpoint-*")] == ["checkpoint-2"]
    steps = []
    line = Line("test")
    line.on_step = lambda progress: steps.append(progress.step)
    assert without_times(e2e_nlg.run(spec, tmp_path / "work", line)) == without_times(whole)
    assert steps == [3, 4]


@pytest.mark.parametrize("method", list(classification.METHODS))
def test_a_classification_cell_is_trained_and_scored(method, tmp_path, shared_data, monkeypatch):
    pytest.importorskip("sklearn", reason="the linear probe needs scikit-learn; pip install 'deltatune[bench]'")
    monkeypatch.setattr(classification.minilm, "minilm_folder", lambda: toys.bert(tmp_path / "bert"))
    study = next(s for s in classification.studies(quick=True) if s.label == f"sentence_polarity/{method}")
    others = [s for s in classification.studies(quick=True) if s.spec.task == "banking77"]
    budget = {**study.spec.budget, "train_rows": 32, "dev_rows": 8, "test_rows": 8, "max_steps": 2, "max_length": 16}
    study = replace(study, spec=replace(study.spec, budget=budget))
    (spec,) = study.tries()
    result = classification.run(spec, tmp_path / "work", Line("test"))
    for part in ("dev", "test"):
        assert 0 <= result[part]["macro_f1"] <= 1 and result[part]["accuracy"] * 8 == int(result[part]["accuracy"] * 8)
    assert result["examples"] == 32
    assert result["steps"] == (None if method == "probe" else 2)
    store = Store(tmp_path / "cells")
    store.put(Cell(spec, result, {"machine": "m", "cores": 2, "threads": 1, "torch": "2", "load": [1.0, 1.0]}))
    assert f"| {classification.NAMES[method]} |" in classification.render([study, *others], store)


def test_probe_features_are_the_mean_over_real_tokens_whatever_the_batch(tmp_path):
    import numpy as np
    import torch
    from harness.probe import features
    from transformers import AutoModel

    folder = toys.bert(tmp_path / "bert")
    texts = ["red cat", "a small bird sings in the old tree", "dog"]
    together = features(folder, texts, 16, 8, print)
    tokenizer, model = toys.tokenizer(), AutoModel.from_pretrained(folder).eval()
    for text, row in zip(texts, together):
        with torch.no_grad():
            alone = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(row, alone.numpy(), atol=1e-5)
