"""`train`: from settings to a trained adapter and its files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltatune.data.order import Order
from deltatune.data.prepare import Corpus, prepare
from deltatune.data.source import load_tables
from deltatune.errors import ConfigError
from deltatune.train import checkpoint as checkpoints
from deltatune.train import randomness, snapshot
from deltatune.train.base import Base, check_device, finish_base, load_base
from deltatune.train.claim import claim, threads
from deltatune.train.conditions import base_facts, compare, compare_machines, conditions, machine, refuse_fewer_steps
from deltatune.train.events import Listener, Listeners, RunInfo
from deltatune.train.finish import before_training, count_parameters, finish
from deltatune.train.judge import Judge
from deltatune.train.lock import output_lock
from deltatune.train.loop import Loop, Position
from deltatune.train.memory import MemoryMeter
from deltatune.train.method import adapt, enable_checkpointing, positions_taken
from deltatune.train.optim import build_optimizer, build_scheduler
from deltatune.train.pace import Pace
from deltatune.train.result import HISTORY, TrainResult, history_lines
from deltatune.train.settings import TrainSettings
from deltatune.train.step import Stepper
from deltatune.train.trackers import TransformersCallbacks, tracker_callbacks, trainer_arguments

Rows = Iterable[dict[str, Any]]


def train(
    settings: TrainSettings,
    *,
    callbacks: Sequence[Any] = (),
    model: nn.Module | None = None,
    tokenizer: Any = None,
    train_rows: Rows | None = None,
    eval_rows: Rows | None = None,
    test_rows: Rows | None = None,
) -> TrainResult:
    """Train, evaluate, and write adapter, settings, metrics, history and samples into `settings.output_dir`.

    Args:
        callbacks: `Listener` objects, and `TrainerCallback` objects of transformers.
        model: A loaded base instead of `model_name_or_path`; needs its `tokenizer`. It is adapted in place.
        train_rows: Rows in memory instead of `train_file`; `eval_rows` and `test_rows` likewise.

    Raises:
        PeftError: Settings, data, checkpoint or model do not allow it, or the numbers are no longer finite.
        TrainingInterrupted: SIGINT or SIGTERM came; a checkpoint was written.
    """
    from transformers import TrainerCallback

    from deltatune.callback import AdapterCallback

    for callback in callbacks:
        if not isinstance(callback, (Listener, TrainerCallback)):
            raise ConfigError(
                f"callback {type(callback).__name__} is no deltatune Listener and no TrainerCallback; subclass one",
                field="callbacks",
            )
    if (model is None) != (tokenizer is None):
        raise ConfigError("model and tokenizer are given together, or neither", field="tokenizer")
    listener = Listeners(c for c in callbacks if isinstance(c, Listener))
    # what AdapterCallback does the loop does anyway
    foreign = [c for c in callbacks if isinstance(c, TrainerCallback) and not isinstance(c, AdapterCallback)]
    foreign += tracker_callbacks(settings.report_to)
    output = Path(settings.output_dir)
    main = int(os.environ.get("RANK", "0")) == 0  # as torchrun and accelerate launch number the processes
    with output_lock(output) if main else nullcontext():
        source = claim(output, settings, listener, main)
        kept = checkpoints.read(source) if source is not None else None
        with threads(settings, kept):
            corpus = load_corpus(settings, train_rows, eval_rows, test_rows, listener)
            given = None if model is None else finish_base(model, tokenizer, settings)
            return _train(settings, corpus, given, listener, foreign, source, kept)


def load_corpus(
    settings: TrainSettings,
    train_rows: Rows | None = None,
    eval_rows: Rows | None = None,
    test_rows: Rows | None = None,
    listener: Listener | None = None,
) -> Corpus:
    """Every row read and checked; no model is needed for it."""
    if listener is not None:
        listener.on_stage("data")
    train_table, eval_table, test_table = load_tables(
        settings.train_file if train_rows is None else train_rows,
        settings.eval_file if eval_rows is None else eval_rows,
        settings.test_file if test_rows is None else test_rows,
        settings.dataset if train_rows is None else None,
        settings.dataset_config,
        settings.eval_split,
        settings.seed,
    )
    return prepare(
        train_table.head(settings.max_train_samples),
        None if eval_table is None else eval_table.head(settings.max_eval_samples),
        test_table,
        settings.task,
        input_column=settings.input_column,
        target_column=settings.target_column,
        text_column=settings.text_column,
        label_column=settings.label_column,
        task_column=settings.task_column,
    )


def _train(
    settings: TrainSettings,
    corpus: Corpus,
    given: Base | None,
    listener: Listeners,
    foreign: list[Any],
    source: Path | None,
    kept: checkpoints.Checkpoint | None,
) -> TrainResult:
    from accelerate import Accelerator

    arguments = trainer_arguments(settings) if foreign else None
    check_device(settings.device)
    accelerator = Accelerator(cpu=settings.device == "cpu")
    device = accelerator.device
    randomness.seed_all(settings.seed)
    listener.on_stage("model")
    base = load_base(settings, corpus.labels, device) if given is None else given
    for notice in base.notices:
        listener.on_notice(notice)
    listener.on_stage("tokens")
    taken = positions_taken(settings.method, settings.task, settings.method_options)
    limit = base.positions - taken if base.positions else settings.max_length
    corpus = corpus.encode(
        base.tokenizer,
        max_length=min(settings.max_length, limit),
        max_target_length=min(settings.max_target_length, limit),
        separator=settings.separator,
        answer_only=settings.completion_only_loss,
        vocabulary=base.vocabulary,
    )
    _tell_lengths(corpus, listener)
    facts = conditions(
        settings,
        corpus.digest,
        corpus.eval.digest if corpus.eval else None,
        base_facts(base.model),
        accelerator.num_processes,
    )
    if kept is not None:
        compare(kept.state["conditions"]["run"], facts, settings.allow_change, str(source), listener.on_notice)
        compare_machines(kept.state["conditions"]["machine"], listener.on_notice)

    base.model.to(device)
    judge = Judge(settings, corpus, base.tokenizer, device, listener)
    untrained = replace(judge, corpus=corpus.without_task_ids())
    before = before_training(untrained, base.model, corpus) if kept is None else kept.state["progress"]["before"]

    order = Order(
        [row.length for row in corpus.train.features],
        settings.seed,
        settings.per_device_train_batch_size,
        settings.gradient_accumulation_steps,
        accelerator.num_processes,
        settings.group_by_length,
    )
    pace = Pace.of(settings, order.steps_per_epoch)
    if kept is not None:
        refuse_fewer_steps(str(source), kept.state["progress"]["step"], pace.total_steps)

    randomness.seed_all(settings.seed)  # what is drawn from here on does not depend on what was evaluated before
    bare = adapt(base.model, settings.method, settings.task, settings.options_of(pace.total_steps))
    if settings.gradient_checkpointing:
        enable_checkpointing(bare)
    for parameter in bare.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()  # small updates vanish in half precision
    optimizer = build_optimizer(bare, settings)
    scheduler = build_scheduler(optimizer, settings, pace.total_steps)
    trackers = None
    if foreign:
        trackers = TransformersCallbacks(foreign, arguments, bare, base.tokenizer, optimizer, scheduler)
        listener.members.append(trackers)
    prepared, wrapped = accelerator.prepare(bare, optimizer)
    memory = MemoryMeter(device)
    memory.measure()

    assert corpus.collator is not None
    filler = corpus.train.features[:1]
    stepper = Stepper(settings, accelerator, prepared, bare, wrapped, scheduler, corpus.collator, filler)
    told = {"run": facts, "machine": machine()}
    position = Position(before=before) if kept is None else Position.of(kept.state["progress"])
    loop = Loop(
        settings,
        accelerator,
        stepper,
        optimizer,
        corpus,
        order,
        pace,
        judge,
        listener,
        trackers,
        told,
        memory,
        position,
    )
    randomness.seed_all(settings.seed)
    if kept is not None:
        snapshot.put_back(kept, bare, optimizer, scheduler, str(source))
        loop.last_saved = source
        if trackers is not None:
            trackers.resume(loop.position.step, loop.position.history, loop.position.callbacks)
    if accelerator.is_main_process:
        (Path(settings.output_dir) / HISTORY).write_bytes(history_lines(loop.position.history))
    trained, total = count_parameters(bare)
    listener.on_begin(
        RunInfo(
            settings=settings,
            total_steps=pace.total_steps,
            start_step=loop.position.step,
            steps_per_epoch=pace.steps_per_epoch,
            train_rows=len(corpus.train.features),
            eval_rows=len(corpus.eval.features) if corpus.eval else 0,
            trainable_parameters=trained,
            total_parameters=total,
            device=str(device),
            num_threads=torch.get_num_threads(),
            resumed_from=source,
        )
    )
    return loop.run(lambda: finish(loop, base.tokenizer, source))


def _tell_lengths(corpus: Corpus, listener: Listener) -> None:
    for part in (corpus.train, corpus.eval, corpus.test):
        if part is None or part.lengths is None:
            continue
        lengths = part.lengths
        if lengths.truncated and corpus.columns.form == "passages":
            listener.on_notice(
                f"{part.source}: {lengths.truncated} of {lengths.rows} contexts are longer than a window of max_length"
            )
        elif lengths.truncated:
            listener.on_notice(
                f"{part.source}: {lengths.truncated} of {lengths.rows} rows were cut to max_length or max_target_length"
            )
        if lengths.dropped:
            listener.on_notice(
                f"{part.source}: {lengths.dropped} of {lengths.rows} rows are left out, because their answers fit into "
                "no window of max_length"
            )
