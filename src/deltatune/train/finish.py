"""The two ends of a run: what the untouched base can do, and what the trained model can, with all files written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltatune.counting import parameter_counts
from deltatune.data.example import TEXT_TASKS
from deltatune.data.prepare import Corpus
from deltatune.train import checkpoint as checkpoints
from deltatune.train import snapshot
from deltatune.train.judge import Judge
from deltatune.train.loop import Loop
from deltatune.train.processes import by_first
from deltatune.train.result import Sample, TrainResult, write_results


def finish(loop: Loop, tokenizer: Any, source: Path | None) -> TrainResult:
    """Final scores and files. The last checkpoint is already written, so a crash here costs no training."""
    settings, corpus, position, judge = loop.settings, loop.corpus, loop.position, loop.judge
    if settings.load_best_model_at_end and position.best_step not in (None, position.step):
        assert position.best_step is not None
        best = checkpoints.read(checkpoints.folder_of(loop.output, position.best_step))
        snapshot.put_back_tensors(best, loop.stepper.bare)
    after: dict[str, Any] = {}
    samples, scores = _answers(judge, loop.stepper.bare, corpus, position.before)
    if corpus.eval is not None:
        after["eval"] = {**judge.loss(loop.stepper.bare, corpus.eval), **scores}
    if corpus.test is not None:
        questions = judge.questions(corpus.test, settings.num_scored if corpus.task in TEXT_TASKS else 0)
        answers = judge.answers(loop.stepper.bare, questions)
        test_scores = judge.text_scores(answers, questions)
        after["test"] = {**judge.loss(loop.stepper.bare, corpus.test), **test_scores}
    trained, total = parameter_counts(loop.stepper.bare)
    losses = [entry["loss"] for entry in position.history if "loss" in entry]
    metrics: dict[str, Any] = {
        "method": settings.method,
        "task": settings.task,
        "steps": position.step,
        "epochs": round(position.step / loop.pace.steps_per_epoch, 4),
        "train_loss": losses[-1] if losses else None,
        "before": position.before.get("scores", {}),
        "after": after,
        "best_eval_loss": position.best_loss,
        "best_metric": settings.metric_for_best_model,
        "best_score": position.best_score,
        "best_step": position.best_step,
        "stopped_early": position.stopped_early,
        "trainable_parameters": trained,
        "total_parameters": total,
        "train_rows": corpus.train.rows,
        "train_seconds": round(position.seconds, 3),
        "train_tokens": position.tokens,
        "peak_memory_bytes": loop.memory.peak,
        "device": str(loop.accelerator.device),
        "num_threads": torch.get_num_threads(),
        "conditions": loop.conditions["machine"],
    }
    result = TrainResult(
        output_dir=loop.output,
        settings=settings,
        model=loop.stepper.bare,
        tokenizer=tokenizer,
        steps=position.step,
        metrics=metrics,
        history=position.history,
        samples=samples,
        resumed_from=source,
        stopped_early=position.stopped_early,
        checkpoints=[path for _, path in checkpoints.listed(loop.output)],
    )
    loop.listener.on_stage("save")
    by_first(loop.accelerator, lambda: write_results(result))
    loop.stepper.bare.eval()
    loop.listener.on_end(metrics)
    return result


def before_training(judge: Judge, model: nn.Module, corpus: Corpus) -> dict[str, Any]:
    """Scores and answers of the untouched base; plain values, because checkpoints carry them."""
    if not judge.settings.eval_before:
        return {}
    part = corpus.eval or corpus.train
    questions = judge.questions(part, _asked(judge, corpus))
    answers = judge.answers(model, questions)
    scores: dict[str, float] = {}
    if corpus.eval is not None:
        scored = judge.text_scores(answers, questions) if judge.settings.num_scored else {}
        scores = {**judge.loss(model, corpus.eval), **scored}
    return {"scores": {"eval": scores} if scores else {}, "answers": answers}


def _answers(
    judge: Judge, model: nn.Module, corpus: Corpus, before: dict[str, Any]
) -> tuple[list[Sample], dict[str, float]]:
    """Samples, and scores of all answers; the samples are the first of the scored ones, spread over the rows."""
    questions = judge.questions(corpus.eval or corpus.train, _asked(judge, corpus))
    answers = judge.answers(model, questions)
    old = before.get("answers") or []
    shown = range(0, len(questions), max(1, len(questions) // max(judge.settings.num_samples, 1)))
    samples = [
        Sample(questions[i].text, questions[i].references, old[i] if i < len(old) else None, answers[i])
        for i in list(shown)[: judge.settings.num_samples]
    ]
    scores = judge.text_scores(answers, questions) if corpus.eval is not None and judge.settings.num_scored else {}
    return samples, scores


def _asked(judge: Judge, corpus: Corpus) -> int:
    """How many inputs are answered: those scored and those shown are the same ones."""
    scored = corpus.eval is not None and corpus.task in TEXT_TASKS and corpus.columns.form != "text"
    return max(judge.settings.num_samples, judge.settings.num_scored if scored else 0)
