"""`train`: from settings to a trained adapter and its files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltatune.counting import parameter_counts
from deltatune.data.order import Order
from deltatune.data.prepare import Corpus
from deltatune.errors import ConfigError
from deltatune.train import checkpoint as checkpoints
from deltatune.train import randomness, snapshot
from deltatune.train.base import Base, check_device, finish_base, load_base
from deltatune.train.begin import begin
from deltatune.train.choice import check_choice
from deltatune.train.chunks import choose_loss
from deltatune.train.claim import claim, threads
from deltatune.train.conditions import base_facts, compare, compare_machines, conditions, machine, refuse_fewer_steps
from deltatune.train.corpus import encode_corpus, load_corpus, tell_leaks, tell_lengths
from deltatune.train.detect import detected
from deltatune.train.events import Listener, Listeners, RunInfo
from deltatune.train.finish import before_training, finish
from deltatune.train.judge import Judge
from deltatune.train.lock import output_lock
from deltatune.train.loop import Loop, Position
from deltatune.train.memory import MemoryMeter
from deltatune.train.method import adapt, enable_checkpointing
from deltatune.train.optim import build_optimizer, build_scheduler
from deltatune.train.pace import Pace
from deltatune.train.packing import check_packing, pack
from deltatune.train.parallel import prepare
from deltatune.train.processes import SHARDING, by_first, check_equal, meet, profile_of
from deltatune.train.quantised import check_quantised
from deltatune.train.regroup import regroup
from deltatune.train.result import HISTORY, TrainResult, history_lines
from deltatune.train.settings import TrainSettings
from deltatune.train.sharding import check_shardable, shard
from deltatune.train.step import Stepper
from deltatune.train.trackers import TransformersCallbacks, tracker_callbacks, trainer_arguments
from deltatune.train.zero import partition

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
    settings = detected(settings, train_rows, None if model is None else model.config)
    # what AdapterCallback does the loop does anyway
    foreign = [c for c in callbacks if isinstance(c, TrainerCallback) and not isinstance(c, AdapterCallback)]
    foreign += tracker_callbacks(settings.report_to, listener.on_notice)
    check_device(settings.device)
    check_quantised(settings, given=model is not None)
    profile = profile_of(settings)
    arguments = trainer_arguments(settings) if foreign else None
    accelerator = meet(settings.device)
    output = Path(settings.output_dir)
    with ExitStack() as held:
        # the first process looks at the folder for all
        by_first(accelerator, lambda: held.enter_context(output_lock(output)))
        source = by_first(accelerator, lambda: claim(output, settings, listener))
        kept = checkpoints.read(source) if source is not None else None
        if kept is not None:
            stored = kept.state["conditions"]["run"]
            settings = regroup(settings, stored, accelerator.num_processes, str(source), listener.on_notice)
        with threads(settings, kept):
            corpus = load_corpus(settings, train_rows, eval_rows, test_rows, listener)
            check_choice(settings, corpus.eval is not None, corpus.columns.form)
            given = None if model is None else finish_base(model, tokenizer, settings)
            return _train(settings, profile, accelerator, corpus, given, listener, foreign, arguments, source, kept)


def _train(
    settings: TrainSettings,
    profile: str,
    accelerator: Any,
    corpus: Corpus,
    given: Base | None,
    listener: Listeners,
    foreign: list[Any],
    arguments: Any,
    source: Path | None,
    kept: checkpoints.Checkpoint | None,
) -> TrainResult:
    device = accelerator.device
    randomness.seed_all(settings.seed)
    listener.on_stage("model")
    base = load_base(settings, corpus.labels, device) if given is None else given
    for notice in base.notices:
        listener.on_notice(notice)
    listener.on_stage("tokens")
    corpus = encode_corpus(settings, corpus, base.tokenizer, base.vocabulary, base.positions)
    tell_lengths(corpus, listener)
    tell_leaks(corpus, listener)
    facts = conditions(
        settings,
        corpus.digest,
        corpus.eval.digest if corpus.eval else None,
        base_facts(base.model),
        accelerator.num_processes,
    )
    check_equal(accelerator, facts)
    if profile in SHARDING:
        check_shardable(base.model, profile)
    if kept is not None:
        compare(kept.state["conditions"]["run"], facts, settings.allow_change, str(source), listener.on_notice)
        compare_machines(kept.state["conditions"]["machine"], listener.on_notice)

    rows = corpus
    if settings.packing:
        corpus = pack(corpus, base.model)
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
    assert corpus.collator is not None
    filler = corpus.train.features[:1]

    def adapted() -> nn.Module:
        randomness.seed_all(settings.seed)  # what is drawn from here on does not depend on what was evaluated before
        options = settings.options_of(pace.total_steps)
        return adapt(base.model, settings.method, settings.task, options, partial(begin, settings, corpus))

    bare: Any = None
    untouched: Callable[[], AbstractContextManager[Any]] = nullcontext
    if profile in SHARDING:  # adapters may start from whole weights, which there are in the host's memory, and only now
        bare = adapted()
        first = corpus.collator(filler)
        if profile == "zero3":
            partition(bare, device, settings.shard_across, settings.zero3_offload, first)
        else:
            shard(bare, device, settings.shard_across, first)
        untouched = bare.disable_adapter
    elif settings.device_map is None:
        base.model.to(device)
    choose_loss(base, settings, listener)
    judge = Judge(settings, rows, base.tokenizer, accelerator, listener)
    if kept is None:
        with untouched():
            before = before_training(replace(judge, corpus=rows.without_task_ids()), base.model, rows)
    else:
        before = kept.state["progress"]["before"]
    bare = adapted() if bare is None else bare
    if settings.packing:
        check_packing(bare, corpus, settings, device)
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
        trackers.first, trackers.first_of_node = accelerator.is_main_process, accelerator.is_local_main_process
        listener.members.append(trackers)
    memory = MemoryMeter(device)
    prepared, wrapped = prepare(accelerator, bare, optimizer, corpus.collator(filler), settings)
    memory.measure()

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
    randomness.seed_process(settings.seed, accelerator.process_index, loop.position.step if kept is not None else 0)
    if kept is not None:
        snapshot.put_back(kept, bare, optimizer, scheduler, str(source), accelerator)
        loop.last_saved = source
        if trackers is not None:
            trackers.resume(loop.position.step, loop.position.history, loop.position.callbacks)
    if accelerator.is_main_process:
        (Path(settings.output_dir) / HISTORY).write_bytes(history_lines(loop.position.history))
    trained, total = parameter_counts(bare)
    listener.on_begin(
        RunInfo(
            settings=settings,
            total_steps=pace.total_steps,
            start_step=loop.position.step,
            steps_per_epoch=pace.steps_per_epoch,
            train_rows=corpus.train.rows,
            eval_rows=len(corpus.eval.features) if corpus.eval else 0,
            trainable_parameters=trained,
            total_parameters=total,
            device=str(device),
            num_threads=torch.get_num_threads(),
            resumed_from=source,
        )
    )
    return loop.run(lambda: finish(loop, base.tokenizer, source))
