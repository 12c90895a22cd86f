"""The rows of a data file as one model reads them, and its loss and predictions for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltatune.config import read_json
from deltatune.data.collate import Collator
from deltatune.data.encode import encode
from deltatune.data.passages import Window
from deltatune.data.prepare import Corpus, Part, prepare
from deltatune.data.read import Table
from deltatune.data.source import Source, load_tables
from deltatune.evaluate import Loss, dataset_loss
from deltatune.generate.load import Ready
from deltatune.train.result import SETTINGS

COLUMNS = ("input_column", "target_column", "text_column", "label_column", "task_column")


def run_settings(folder: str | None) -> dict[str, Any]:
    """Everything that the run which trained an adapter was told; nothing where it left no settings."""
    file = Path(folder or "") / SETTINGS
    return read_json(file) if folder and file.is_file() else {}


def read(
    source: Source,
    task: str,
    classes: Sequence[str] | None,
    told: Mapping[str, Any],
    columns: Mapping[str, str],
    limit: int | None,
) -> Corpus:
    """The checked rows of a data source, evenly thinned out to `limit`.

    Args:
        classes: Those that the models know.
        told: Settings of the run, for the names of its columns.
        columns: Other names for columns, as {name that we know: name in the file}; they win over the run's.
    """
    mapping = {**(told.get("column_mapping") or {}), **columns}
    tables, _, _ = load_tables(source, None, None, None, None, 0.0, 0, columns=mapping)
    named = {name: told.get(name) for name in COLUMNS if not columns}
    return prepare([_thinned(table, limit) for table in tables], None, None, task, classes=classes, **named)


def encoded(corpus: Corpus, ready: Ready, tasks: bool = True) -> Corpus:
    """The rows as tokens of this model. Without `tasks` it is not told which task a row is of."""
    encoder = replace(ready.encoder, labels=corpus.labels)
    part, tokenizer = corpus.train, ready.tokenizer
    vocabulary = ready.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    features, lengths = encode(part.examples, encoder, part.source, vocabulary, training=False)
    collator = Collator(tokenizer.pad_token_id or 0, ready.task)
    made = replace(corpus, train=replace(part, features=features, lengths=lengths), encoder=encoder, collator=collator)
    return made if tasks else made.without_task_ids()


def losses(
    corpus: Corpus, ready: Ready, batch_size: int, after_batch: Callable[[int], Any] = lambda done: None
) -> Loss:
    """`predicted` and `rows` in the order of the corpus; a row of several windows is one row."""
    part, collate = corpus.train, corpus.collator
    assert collate is not None
    order = sorted(range(len(part.features)), key=lambda i: part.features[i].length)
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    batches = (collate([part.features[i] for i in chunk]) for chunk in chunks)
    device = next(ready.model.parameters()).device
    found = dataset_loss(ready.model, batches, ready.task, device, after_batch, by_row=True)
    places = sorted(range(len(order)), key=order.__getitem__)
    predicted = [found.predicted[i] for i in places] if found.predicted else []
    rows = _together(part, [found.rows[i] for i in places])
    return Loss(found.mean, found.targets, predicted, rows)


def _together(part: Part, rows: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    windows = [row for row in part.features if isinstance(row, Window)]
    if not windows:
        return list(rows)
    sums = {window.row: (0.0, 0) for window in windows}
    for window, (loss, count) in zip(windows, rows):
        before = sums[window.row]
        sums[window.row] = before[0] + loss, before[1] + count
    return list(sums.values())


def _thinned(table: Table, limit: int | None) -> Table:
    count = len(table.rows)
    if limit is None or limit >= count:
        return table
    kept = [i * count // limit for i in range(limit)]
    return replace(table, rows=[table.rows[i] for i in kept], lines=[table.lines[i] for i in kept])
