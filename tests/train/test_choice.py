"""The best evaluation by a score other than the loss, and evaluations that let the model answer."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from deltatune.errors import ConfigError
from deltatune.train import Listener, TrainSettings, train
from deltatune.train.choice import better
from deltatune.train.judge import Judge
from deltatune.train.trackers import tracker_callbacks, trainer_arguments


def test_what_is_better():
    assert better("loss", 1.0, None) and better("loss", 1.0, 2.0) and not better("loss", 2.0, 1.0)
    assert better("bleu", 2.0, 1.0) and not better("bleu", 1.0, 1.0) and not better("perplexity", 2.0, 1.0)


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """The model's answers score these values, one after another; the loss falls all the time."""
    losses = iter(range(100, 0, -1))
    left = iter(values)
    monkeypatch.setattr(Judge, "loss", lambda self, model, part: {"loss": float(next(losses)), "perplexity": 1.0})
    monkeypatch.setattr(Judge, "written", lambda self, model, part: {"bleu": next(left)})


def test_the_best_and_the_end_go_by_the_score(settings: Any, files: Any, monkeypatch: pytest.MonkeyPatch):
    scripted(monkeypatch, [1.0, 5.0, 4.0, 3.0, 9.0])
    told = settings(
        eval_file=str(files["seq2seq"]), max_steps=10, eval_steps=1, save_steps=1, early_stopping_patience=2,
        predict_with_generate=True, num_scored=2, metric_for_best_model="eval_bleu", load_best_model_at_end=True,
    )  # fmt: skip
    result = train(told)
    found = result.metrics
    assert (result.steps, result.stopped_early) == (4, True)
    assert (found["best_metric"], found["best_score"], found["best_step"]) == ("bleu", 5.0, 2)
    assert found["best_eval_loss"] == 99.0
    assert (result.output_dir / "checkpoint-2").is_dir()
    assert [entry["eval_bleu"] for entry in result.history if "eval_bleu" in entry] == [1.0, 5.0, 4.0, 3.0]


def test_evaluations_score_what_the_model_writes(settings: Any, files: Any):
    result = train(settings(eval_file=str(files["seq2seq"]), eval_steps=2, predict_with_generate=True, num_scored=4))
    entries = [entry for entry in result.history if "eval_loss" in entry]
    assert len(entries) == 2
    assert all({"eval_bleu", "eval_rouge_l", "eval_exact_match"} <= entry.keys() for entry in entries)


def test_answering_leaves_the_training_as_it_was(settings_into: Any, files: Any, tmp_path: Path):
    common = {"eval_file": str(files["seq2seq"]), "eval_steps": 1, "logging_steps": 1}
    plain = train(settings_into(tmp_path / "plain", **common))
    asked = train(settings_into(tmp_path / "asked", **common, predict_with_generate=True, num_scored=4))
    losses = [[entry["loss"] for entry in r.history if "loss" in entry] for r in (plain, asked)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"task": "seq2seq", "metric_for_best_model": "bleu"}, "expected predict_with_generate: true beside it"),
        ({"task": "seq_cls", "metric_for_best_model": "bleu"}, "one of loss, accuracy, macro_f1"),
        ({"task": "seq_cls", "predict_with_generate": True}, "false with task classification"),
        ({"task": "seq2seq", "predict_with_generate": True, "num_scored": 0}, "num_scored=0 is not allowed"),
    ],
)
def test_choices_that_cannot_be_are_refused(given: dict[str, Any], told: str):
    with pytest.raises(ConfigError, match=told):
        TrainSettings(**given)


def test_a_choice_without_rows_or_answers_is_refused_before_the_model_is_loaded(settings: Any, tmp_path: Path):
    words = {"predict_with_generate": True, "num_scored": 2, "model_name_or_path": "not/there"}
    with pytest.raises(ConfigError, match="needs rows to evaluate on"):
        train(settings(**words))
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "the cat sleeps"}\n' * 8)
    with pytest.raises(ConfigError, match="plain text"):
        train(settings("causal", **words, train_file=str(text), eval_file=str(text)))


def test_callbacks_of_transformers_are_told_the_choice():
    made = trainer_arguments(TrainSettings(task="classification", metric_for_best_model="accuracy"))
    assert (made.metric_for_best_model, made.greater_is_better) == ("eval_accuracy", True)
    assert trainer_arguments(TrainSettings()).greater_is_better is False


class TestTensorboard:
    """The default tracker: there where its package is, said, and never the end of a run."""

    def installed(self, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
        from transformers.integrations import integration_utils

        monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: there)

    def test_without_the_package_there_is_none_and_nothing_is_said(self, monkeypatch: pytest.MonkeyPatch):
        self.installed(monkeypatch, False)
        said: list[str] = []
        assert tracker_callbacks(None, said.append) == [] and said == []

    def test_with_the_package_it_gets_the_curves_and_the_run_says_so(self, settings: Any, files: Any, monkeypatch: Any):
        self.installed(monkeypatch, True)
        written: list[tuple[str, int]] = []

        class Writer:
            def __init__(self, log_dir: str) -> None:
                self.log_dir = log_dir

            def add_text(self, *facts: Any) -> None: ...
            def flush(self) -> None: ...
            def close(self) -> None: ...
            def add_scalar(self, name: str, value: float, step: int) -> None:
                written.append((name, step))

        package = types.ModuleType("torch.utils.tensorboard")
        package.SummaryWriter = Writer  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
        notices: list[str] = []

        class Notices(Listener):
            def on_notice(self, text: str) -> None:
                notices.append(text)

        train(settings(eval_file=str(files["seq2seq"]), logging_steps=2), callbacks=[Notices()])
        assert any("tensorboard" in text for text in notices)
        assert {("train/loss", 2), ("train/loss", 4), ("eval/loss", 4)} <= set(written)

    def test_a_package_that_does_not_start_costs_no_run(self, monkeypatch: pytest.MonkeyPatch):
        from transformers.integrations import integration_utils

        def broken() -> Any:
            raise ValueError("a protobuf of another time")

        self.installed(monkeypatch, True)
        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", broken)
        said: list[str] = []
        assert tracker_callbacks(None, said.append) == []
        assert "does not start (ValueError)" in said[0]

    def test_none_is_no_tracker_and_a_name_that_is_asked_for_must_start(self, monkeypatch: pytest.MonkeyPatch):
        self.installed(monkeypatch, True)
        assert tracker_callbacks(TrainSettings(report_to="none").report_to) == []
        self.installed(monkeypatch, False)
        with pytest.raises(ConfigError, match="report_to='tensorboard' cannot start"):
            tracker_callbacks(TrainSettings(report_to="tensorboard").report_to)


def test_the_choice_is_a_condition_of_resuming_only_where_it_decides(settings: Any, files: Any, tmp_path: Path):
    common = {"eval_file": str(files["seq2seq"]), "eval_steps": 2, "save_steps": 2, "report_to": []}
    train(settings(**common))
    kept = json.loads((tmp_path / "out" / "checkpoint-4" / "state.json").read_text())["conditions"]["run"]
    assert "metric_for_best_model" not in kept
    train(settings(**common, load_best_model_at_end=True, overwrite_output_dir=True))
    kept = json.loads((tmp_path / "out" / "checkpoint-4" / "state.json").read_text())["conditions"]["run"]
    assert kept["metric_for_best_model"] == "loss"
