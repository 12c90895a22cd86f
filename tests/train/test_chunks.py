"""The setting `loss`: the same training in chunks, chosen where it saves memory and serves the model."""

import json

import pytest
import torch

from deltatune.errors import ConfigError
from deltatune.kernels import linear_cross_entropy as kernel
from deltatune.loss.stage import STAGE
from deltatune.train import Listener, train
from deltatune.train.base import load_base


class Recorder(Listener):
    def __init__(self):
        self.losses, self.notices = [], []

    def on_step(self, progress):
        self.losses.append(progress.loss)

    def on_notice(self, text):
        self.notices.append(text)


def run(settings, **given):
    recorder = Recorder()
    train(settings, callbacks=[recorder], **given)
    return recorder


def is_chunked(settings):
    """Whether a run of these settings has put it on the model."""
    base = load_base(settings)
    run(settings, model=base.model, tokenizer=base.tokenizer)
    return STAGE in vars(base.model)


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "full"])
@pytest.mark.parametrize("task", ["seq2seq", "causal"])
def test_the_same_losses_and_scores(task, method, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", 1)
    changes = {"method": method, "eval_split": 0.25, "eval_steps": 2, "per_device_train_batch_size": 8}
    own = run(settings(task, loss="model", output_dir=str(tmp_path / "own"), **changes))
    chunked = run(settings(task, loss="chunked", output_dir=str(tmp_path / "chunked"), **changes))
    assert chunked.losses == pytest.approx(own.losses, rel=1e-4)
    histories = [
        [json.loads(line) for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
        for name in ("own", "chunked")
    ]
    evaluations = [[line["eval_loss"] for line in lines if "eval_loss" in line] for lines in histories]
    assert evaluations[0] and evaluations[1] == pytest.approx(evaluations[0], rel=1e-4)


def test_chosen_where_a_batch_has_more_logits_than_are_made_at_once(settings, monkeypatch):
    assert not is_chunked(settings("causal"))
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", 1)
    assert is_chunked(settings("causal", overwrite_output_dir=True))
    assert not is_chunked(settings("causal", overwrite_output_dir=True, max_length=4))  # 4 rows of 4, 16 at once
    assert not is_chunked(settings("causal", overwrite_output_dir=True, loss="model"))


def test_a_model_that_it_does_not_serve(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", 1)
    found = []
    for number, loss in enumerate(["auto", "chunked"]):
        chosen = settings("causal", loss=loss, output_dir=str(tmp_path / str(number)))
        base = load_base(chosen)
        own = base.model.loss_function
        base.model.loss_function = lambda logits, *args, own=own, **options: own(logits.sin(), *args, **options)
        if loss == "auto":
            found = run(chosen, model=base.model, tokenizer=base.tokenizer).notices
        else:
            with pytest.raises(ConfigError, match=r"loss='chunked' does not serve LlamaForCausalLM: sin needs them"):
                run(chosen, model=base.model, tokenizer=base.tokenizer)
    assert "the loss is computed from all logits at once: sin needs them" in found


def test_tasks_without_a_vocabulary(settings):
    with pytest.raises(ConfigError, match="loss='chunked' does not serve BertForSequenceClassification"):
        run(settings("classification", loss="chunked"))


def test_half_precision(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", 1)
    both = {
        loss: run(settings("causal", loss=loss, dtype="bfloat16", output_dir=str(tmp_path / loss))).losses
        for loss in ("model", "chunked")
    }
    assert torch.isfinite(torch.tensor(both["chunked"])).all()
    assert both["chunked"] == pytest.approx(both["model"], rel=2e-2)
