"""What a step computes, what it refuses, and what stops it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deltatune.errors import ConfigError, DataError, LimitError, PeftError, StateError, TrainError
from deltatune.train import Listener, TrainingInterrupted, train
from deltatune.train import checkpoint as checkpoints
from deltatune.train.lock import output_lock
from tests.train import toys


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


class Recorder(Listener):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.events: list[str] = []

    def on_begin(self, run: Any) -> None:
        self.run = run
        self.events.append("begin")

    def on_step(self, progress: Any) -> None:
        self.losses.append(progress.loss)
        self.progress = progress

    def on_checkpoint(self, step: int, folder: Path) -> None:
        self.events.append(f"checkpoint {step}")

    def on_end(self, metrics: Any) -> None:
        self.events.append("end")


@pytest.mark.parametrize("task", ["seq2seq", "causal", "classification"])
def test_accumulated_micro_batches_equal_one_large_batch(task, settings, tmp_path):
    # AdamW turns rounding of tiny gradients into whole steps; a large epsilon keeps the comparison about the gradients
    changes = {"lr_scheduler_type": "constant", "adam_epsilon": 1.0, "learning_rate": 1.0, "method": "ia3"}
    if task == "seq2seq":
        changes["target_modules"] = ["k", "v", "wo"]
        changes["feedforward_modules"] = ["wo"]
    # dropout would draw differently for batches of other shapes
    plain = {"seq2seq": toys.t5, "causal": toys.llama, "classification": toys.bert}[task]
    changes["model_name_or_path"] = str(plain(tmp_path / "base", **({} if task == "causal" else {"dropout": 0.0})))
    one, four = Recorder(), Recorder()
    large = settings(task, per_device_train_batch_size=8, output_dir=str(tmp_path / "large"), **changes)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    small = settings(task, output_dir=str(tmp_path / "small"), **parts, **changes)
    train(large, callbacks=[one])
    train(small, callbacks=[four])
    assert four.losses == pytest.approx(one.losses, rel=1e-5)
    split = adapter(tmp_path / "small")
    for key, value in adapter(tmp_path / "large").items():
        assert torch.allclose(value, split[key], atol=1e-5), key


def test_the_reported_loss_is_the_mean_over_all_answer_tokens(settings, bases):
    """Against plain cross entropy over the same rows, at a learning rate that changes nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = toys.pairs(24)
    recorder = Recorder()
    tiny = settings("causal", max_steps=1, per_device_train_batch_size=24, learning_rate=1e-30)
    train(tiny, callbacks=[recorder])
    model = AutoModelForCausalLM.from_pretrained(bases["causal"]).eval()
    words = AutoTokenizer.from_pretrained(bases["causal"])
    total, count = 0.0, 0
    for row in rows:
        prompt = words(row["input"])["input_ids"][:-1]  # without the closing token
        answer = words(row["target"])["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0]
        scored = logits[len(prompt) - 1 : -1].log_softmax(-1)
        total -= float(scored.gather(1, torch.tensor(answer)[:, None]).sum())
        count += len(answer)
    assert recorder.losses[0] == pytest.approx(total / count, rel=1e-5)


def test_only_the_adapter_trains_and_in_float32_whatever_the_base_is_stored_in(settings, bases, tmp_path):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    half = AutoModelForSeq2SeqLM.from_pretrained(bases["seq2seq"], dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(bases["seq2seq"]).save_pretrained(tmp_path / "half")
    result = train(settings(model_name_or_path=str(tmp_path / "half")))
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    trained = result.model.get_base_model().state_dict()
    kept = [name for name in base.state_dict() if name in trained]
    assert kept
    assert all(base.state_dict()[name].equal(trained[name]) for name in kept)


def test_evaluation_does_not_change_what_is_learnt(settings, tmp_path):
    changes: dict[str, Any] = {"eval_split": 0.25, "lora_dropout": 0.2}
    train(settings(output_dir=str(tmp_path / "never"), eval_steps=0, **changes))
    often = {"eval_steps": 1, "num_samples": 2, "num_scored": 4, "eval_before": True}
    result = train(settings(output_dir=str(tmp_path / "often"), **often, **changes))
    never, other = adapter(tmp_path / "never"), adapter(tmp_path / "often")
    assert all(never[key].equal(other[key]) for key in never)
    assert {"loss", "perplexity", "bleu", "rouge_l", "exact_match"} <= result.metrics["after"]["eval"].keys()
    assert len(result.samples) == 2
    assert all(sample.before is not None and sample.after is not None for sample in result.samples)


def test_the_adapter_is_reloaded_with_the_same_outputs(settings, bases, tmp_path):
    from transformers import AutoModelForSeq2SeqLM

    from deltatune import PeftModel

    result = train(settings(method="prefix_tuning", num_virtual_tokens=3))
    fresh = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(bases["seq2seq"]), tmp_path / "out")
    inputs = {"input_ids": torch.tensor([[4, 5, 6, 1]]), "labels": torch.tensor([[6, 5, 4, 1]])}
    with torch.no_grad():
        assert fresh.eval()(**inputs).logits.equal(result.model(**inputs).logits)


def test_a_base_in_half_precision_trains_an_adapter_and_a_head_in_float32(settings):
    result = train(settings("classification", dtype="bfloat16", eval_split=0.25))
    trained = [parameter for parameter in result.model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32, torch.bfloat16}
    assert 0 < result.metrics["after"]["eval"]["loss"] < 2


def test_rows_longer_than_the_model_has_positions_are_cut_and_told(settings, tmp_path):
    class Notices(Listener):
        texts: list[str] = []

        def on_notice(self, text: str) -> None:
            self.texts.append(text)

    rows = [{"text": "red cat " * 100, "label": 0}, {"text": "blue dog", "label": 1}]  # 64 positions
    notices = Notices()
    train(settings("classification", max_steps=1), train_rows=rows, callbacks=[notices])
    assert any("1 of 2 rows were cut" in text for text in notices.texts)


def test_virtual_tokens_at_the_input_find_room_among_the_positions(settings):
    rows = [{"text": "red cat " * 100, "label": 0}, {"text": "blue dog", "label": 1}]  # 64 positions
    options = {"method": "prompt_tuning", "num_virtual_tokens": 10, "max_steps": 1}
    result = train(settings("classification", **options), train_rows=rows)
    assert result.steps == 1 and len(result.model.prompt_encoder) == 1


def test_bad_data_is_refused_before_the_model_is_looked_for_and_leaves_nothing(settings, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"input": "red"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl: columns \['input'\]"):
        train(settings(train_file=str(tmp_path / "bad.jsonl"), model_name_or_path="/no/such/folder"))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_told(settings):
    with pytest.raises(ConfigError, match="device='cuda' is not available"):
        train(settings(device="cuda"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_name_or_path": "/no/such/folder"}, "model folder /no/such/folder does not exist"),
        ({"target_modules": ["query"]}, "matches no module"),
        ({"resume_from_checkpoint": "/no/such/folder"}, "is no folder; give a checkpoint folder"),
        ({"report_to": "tensorbord"}, "report_to='tensorbord' is not known"),
    ],
)
def test_what_cannot_start_is_answered_in_one_line(changes, told, settings):
    with pytest.raises(PeftError, match=told) as caught:
        train(settings(**changes))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- numbers that break


class Poison(Listener):
    """Puts NaN into the model, or its gradient, once `step` is done."""

    def __init__(self, step: int, where: str) -> None:
        self.step, self.where = step, where
        self.model: Any = None

    def on_step(self, progress: Any) -> None:
        if progress.step != self.step:
            return
        parameter = next(p for p in self.model.parameters() if p.requires_grad)
        if self.where == "gradient":
            parameter.register_hook(lambda gradient: gradient * float("nan"))
        elif self.where == "loss":
            self.model.get_input_embeddings().weight.data.fill_(float("inf"))
        else:
            parameter.data.fill_(float("inf"))


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("loss", r"loss is nan at step 3, learning rate .*last good checkpoint: .*checkpoint-2"),
        ("gradient", r"gradient of .*lora_A.* is not finite at step 3.*last good checkpoint: .*checkpoint-2"),
        ("weights", r"weights of .*lora_A.* are not finite after step 2.*last good checkpoint: .*checkpoint-1"),
    ],
)
def test_numbers_that_are_not_finite_stop_the_run_at_that_step(where, told, settings, tmp_path):
    from deltatune.train.base import load_base

    run = settings(save_steps=1)
    base = load_base(run)
    poison = Poison(2, where)
    poison.model = base.model
    with pytest.raises(TrainError, match=told) as caught:
        train(run, callbacks=[poison], model=base.model, tokenizer=base.tokenizer)
    assert "\n" not in str(caught.value)
    kept = checkpoints.newest(tmp_path / "out")
    assert kept is not None
    stored = checkpoints.read(kept).tensors
    assert all(tensor.isfinite().all() for tensor in [*stored["trainable"].values(), *stored["optimizer"].values()])
    assert not (tmp_path / "out/metrics.json").exists()


def test_memory_that_runs_out_is_told_with_what_to_lower(settings, tmp_path):
    from deltatune.train.base import load_base

    run = settings(save_steps=1)
    base = load_base(run)
    calls = []

    def starve(module: Any, arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )

    base.model.register_forward_pre_hook(starve)
    told = r"out of memory at step 3 .*lower per_device_train_batch_size.*last good checkpoint: .*checkpoint-2"
    with pytest.raises(LimitError, match=told):
        train(run, model=base.model, tokenizer=base.tokenizer)
    assert checkpoints.newest(tmp_path / "out") == tmp_path / "out" / "checkpoint-2"


# ------------------------------------------------------------------------------------------------------------- signals


class Signal(Listener):
    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_step(self, progress: Any) -> None:
        if progress.step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(number, code, settings, tmp_path):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match=r"after step 2; checkpoint .*checkpoint-2") as caught:
        train(settings(), callbacks=[Signal(number, 2)])
    assert caught.value.exit_code == code
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert checkpoints.newest(tmp_path / "out") == caught.value.checkpoint
    train(settings(resume_from_checkpoint=True))
    train(settings(output_dir=str(tmp_path / "whole")))
    one, other = adapter(tmp_path / "out"), adapter(tmp_path / "whole")
    assert all(one[key].equal(other[key]) for key in one)


class SignalInEvaluation(Listener):
    def __init__(self) -> None:
        self.sent = False

    def on_step(self, progress: Any) -> None:
        self.step = progress.step

    def on_stage_progress(self, done: int) -> None:
        if not self.sent and getattr(self, "step", 0) == 2:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_during_an_evaluation_does_not_lose_it(settings, tmp_path):
    changes = {"eval_split": 0.25, "eval_steps": 2}
    with pytest.raises(TrainingInterrupted, match="after step 2"):
        train(settings(**changes), callbacks=[SignalInEvaluation()])
    result = train(settings(resume_from_checkpoint=True, **changes))
    assert [entry["step"] for entry in result.history if "eval_loss" in entry] == [2, 4]


# -------------------------------------------------------------------------------------------------------- output folder


def test_the_folder_of_another_run_is_not_overwritten_unasked(settings, tmp_path):
    train(settings())
    before = adapter(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"output_dir .* holds another run .*overwrite_output_dir"):
        train(settings(seed=1))
    assert all(before[key].equal(value) for key, value in adapter(tmp_path / "out").items())
    train(settings(seed=1, overwrite_output_dir=True))
    assert not all(before[key].equal(value) for key, value in adapter(tmp_path / "out").items())


def test_two_runs_cannot_share_a_folder(settings, tmp_path):
    with (
        output_lock(tmp_path / "out"),
        pytest.raises(StateError, match=rf"in use by another training run \(process {os.getpid()}\)"),
    ):
        train(settings())


def test_a_file_where_the_folder_should_be_is_told(settings, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"output_dir .*file"):
        train(settings(output_dir=str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "mine"


# ------------------------------------------------------------------------------------------------------- watching


def test_listeners_see_the_run_in_order(settings):
    recorder = Recorder()
    result = train(settings(save_steps=2), callbacks=[recorder])
    assert recorder.events == ["begin", "checkpoint 2", "checkpoint 4", "end"]
    assert recorder.run.total_steps == 4
    assert recorder.run.trainable_parameters == result.metrics["trainable_parameters"]
    assert recorder.progress.step == 4
    assert recorder.progress.remaining_seconds == 0
    assert result.history[-1]["loss"] == pytest.approx(sum(recorder.losses) / 4)


def test_callbacks_of_transformers_see_and_steer_the_run(settings):
    from transformers import EarlyStoppingCallback, TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append((state.global_step, args.learning_rate, logs.get("loss")))

        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 3

    watch = Watch()
    # losses cannot improve at this rate beyond the threshold, so the second evaluation without gain stops the run
    callbacks = [watch, EarlyStoppingCallback(2, early_stopping_threshold=10.0)]
    recorder = Recorder()
    changes = {"max_steps": 8, "eval_split": 0.25, "eval_steps": 1, "save_steps": 0, "logging_steps": 1}
    result = train(settings(**changes), callbacks=[*callbacks, recorder])
    assert watch.seen[0][:2] == (1, 1e-2)
    assert watch.seen[0][2] == pytest.approx(recorder.losses[0])
    assert result.steps == 3
    assert result.stopped_early
    assert recorder.events[1:] == ["checkpoint 3", "end"]


def test_patience_stops_a_run_that_no_longer_gains(settings):
    changes = {"max_steps": 20, "eval_split": 0.25, "eval_steps": 1, "early_stopping_patience": 2, "learning_rate": 5.0}
    result = train(settings(**changes, lr_scheduler_type="constant", warmup_ratio=0.0))
    assert result.stopped_early
    assert result.steps < 20
    assert result.metrics["stopped_early"]


def test_the_best_weights_can_be_what_is_kept(settings, tmp_path):
    changes = {"max_steps": 6, "eval_split": 0.25, "eval_steps": 1, "learning_rate": 3.0, "method": "prefix_tuning"}
    result = train(settings(**changes, num_virtual_tokens=2, load_best_model_at_end=True, save_total_limit=1))
    losses = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
    assert result.metrics["best_step"] == losses.index(min(losses)) + 1
    assert result.metrics["after"]["eval"]["loss"] == pytest.approx(min(losses), rel=1e-6)


def test_tensorboard_gets_the_curve(settings, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(settings(report_to="tensorboard", logging_steps=1))
    folder = next((tmp_path / "out" / "runs").iterdir())
    events = EventAccumulator(str(folder))
    events.Reload()
    history = [json.loads(line) for line in (tmp_path / "out/history.jsonl").read_text().splitlines()]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([e["loss"] for e in history])
