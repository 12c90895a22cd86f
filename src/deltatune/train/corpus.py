"""From settings to the rows of a run and their tokens: the one way for `train`, `train --dry-run` and `data check`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from deltatune.data.alike import normal
from deltatune.data.encode import within
from deltatune.data.prepare import Corpus, prepare
from deltatune.data.source import load_tables
from deltatune.data.templates import set_template
from deltatune.errors import DataError
from deltatune.train.events import Listener
from deltatune.train.method import positions_taken
from deltatune.train.settings import TrainSettings

Rows = Iterable[dict[str, Any]]


def load_corpus(
    settings: TrainSettings,
    train_rows: Rows | None = None,
    eval_rows: Rows | None = None,
    test_rows: Rows | None = None,
    listener: Listener | None = None,
    faults: list[DataError] | None = None,
) -> Corpus:
    """Every row read and checked; no model is needed for it. With `faults`, faulty rows are left out and told there."""
    if listener is not None:
        listener.on_stage("data")
    train, evaluation, test = load_tables(
        settings.train_file if train_rows is None else train_rows,
        settings.eval_file if eval_rows is None else eval_rows,
        settings.test_file if test_rows is None else test_rows,
        settings.dataset if train_rows is None else None,
        settings.dataset_config,
        settings.eval_split,
        settings.seed if settings.split_seed is None else settings.split_seed,
        weights=settings.data_weights,
        columns=settings.column_mapping,
        max_train=settings.max_train_samples,
        max_eval=settings.max_eval_samples,
        faults=faults,
    )
    return prepare(
        train,
        evaluation,
        test,
        settings.task,
        input_column=settings.input_column,
        target_column=settings.target_column,
        text_column=settings.text_column,
        label_column=settings.label_column,
        task_column=settings.task_column,
        faults=faults,
    )


def encode_corpus(
    settings: TrainSettings,
    corpus: Corpus,
    tokenizer: Any,
    vocabulary: int | None,
    positions: int | None,
    faults: list[DataError] | None = None,
) -> Corpus:
    """The rows with their tokens.

    Args:
        vocabulary: Tokens that the model has embeddings for.
        positions: Tokens a row can have at most, those of the method included.
    """
    if settings.task == "chat":
        set_template(tokenizer, settings.chat_template)
    limit = settings.max_length
    if positions:
        limit = positions - positions_taken(settings.method, settings.task, settings.method_options)
    return corpus.encode(
        tokenizer,
        max_length=min(settings.max_length, limit),
        max_target_length=within(settings.max_target_length, limit),
        separator=settings.separator,
        answer_only=settings.completion_only_loss,
        vocabulary=vocabulary,
        truncation=settings.truncation,
        train_on=settings.train_on,
        faults=faults,
    )


def tell_lengths(corpus: Corpus, listener: Listener) -> None:
    """What the limits cut, in notices."""
    assert corpus.encoder is not None
    for part in (corpus.train, corpus.eval, corpus.test):
        if part is None or part.lengths is None:
            continue
        lengths, limit = part.lengths, corpus.encoder.max_length
        longest = max(lengths.whole, default=0)
        if lengths.truncated and corpus.columns.form == "passages":
            listener.on_notice(
                f"{part.source}: {lengths.truncated} of {lengths.rows} contexts are longer than a window of max_length"
            )
        elif lengths.truncated and _drops(corpus):
            listener.on_notice(
                f"{part.source}: {lengths.truncated} of {lengths.rows} rows have more than max_length={limit} tokens "
                f"(up to {longest}) and are left out"
            )
        elif lengths.truncated:
            listener.on_notice(
                f"{part.source}: {lengths.truncated} of {lengths.rows} rows were cut to max_length or "
                f"max_target_length (the longest has {longest} tokens)"
            )
        if lengths.dropped and corpus.columns.form == "passages":
            listener.on_notice(
                f"{part.source}: {lengths.dropped} of {lengths.rows} rows are left out, because their answers fit into "
                "no window of max_length"
            )
        elif lengths.dropped and not _drops(corpus):
            listener.on_notice(
                f"{part.source}: {lengths.dropped} of {lengths.rows} rows are left out, because nothing of their "
                f"answers is within max_length={limit}; raise it, or cut with truncation: left"
            )


def tell_leaks(corpus: Corpus, listener: Listener) -> None:
    """Inputs to be scored that are trained on too, in a notice: such scores say nothing of other inputs."""
    for part in (corpus.eval, corpus.test):
        if part is None:
            continue
        asked = [normal(example.text) for example in part.examples]
        wanted = set(asked)
        trained = {text for example in corpus.train.examples if (text := normal(example.text)) in wanted}
        if count := sum(text in trained for text in asked):
            listener.on_notice(
                f"{part.source}: {count} of {len(asked)} inputs are trained on too, and scores on them say nothing; "
                "deltatune data check tells which"
            )


def _drops(corpus: Corpus) -> bool:
    return corpus.encoder is not None and corpus.encoder.truncation == "drop"
