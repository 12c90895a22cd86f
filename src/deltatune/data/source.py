"""Which tables a run trains and evaluates on: files, folders, patterns, datasets, or rows in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltatune.data.hub import is_saved, load_dataset, load_saved
from deltatune.data.mixture import limited, mixed, sampled, split
from deltatune.data.places import places
from deltatune.data.read import Table, read_table, table_of
from deltatune.errors import DataError

Rows = Iterable[dict[str, Any]]
Source = str | Path | Sequence[str] | Rows


def load_tables(
    train: Source | None,
    evaluation: Source | None,
    test: Source | None,
    dataset: str | None,
    dataset_config: str | None,
    eval_split: float,
    seed: int,
    *,
    weights: Sequence[float] = (),
    columns: Mapping[str, str] | None = None,
    max_train: int | None = None,
    max_eval: int | None = None,
    faults: list[DataError] | None = None,
) -> tuple[list[Table], list[Table], list[Table]]:
    """(train, evaluation, test), each one table per file; the last two may have none.

    Without evaluation rows a share of the training rows is set aside. A source is a file, a folder, a pattern, a list
    of these, or rows in memory.

    Args:
        weights: The share of each training source, none of whose rows is repeated for it; all rows when left out.
        columns: Other names for columns, as {new name: name in the file}.
        max_train: Training rows, of all sources together, taken from their beginnings.
        faults: Where given, faulty rows are left out and told there, instead of ending the reading.
    """
    whole = bool(eval_split or weights)  # then every row is needed, however few are used
    if dataset is not None:
        tables, held_out = load_dataset(dataset, dataset_config)
    elif train is None:
        raise DataError(
            "no training data: set train_file (a local file) or dataset (a name of the datasets library)",
            field="train_file",
            expected="a file",
        )
    else:
        tables, held_out = _tables(train, "train rows", seed, None if whole else max_train, faults), []
    if evaluation is not None:
        held_out = _tables(evaluation, "eval rows", seed, max_eval, faults)
    final = _tables(test, "test rows", seed, None, faults) if test is not None else []
    named = [[table.renamed(columns or {}) for table in part] for part in (tables, held_out, final)]
    tables, held_out, final = named
    if weights:
        tables = mixed(tables, weights, seed)
    if not held_out and eval_split > 0:
        parts = [split(table, eval_split, seed) for table in tables]
        tables, held_out = [kept for kept, _ in parts], [aside for _, aside in parts]
    return limited(tables, max_train), limited(held_out, max_eval), final


def _tables(source: Source, name: str, seed: int, limit: int | None, faults: list[DataError] | None) -> list[Table]:
    if isinstance(source, str | Path):
        source = [str(source)]
    listed = list(source)
    if not listed or not all(isinstance(each, str) for each in listed):
        return [table_of(listed, name)]  # type: ignore[arg-type]
    made: list[Table] = []
    for place in places(listed):  # type: ignore[arg-type]
        if is_saved(place.path):
            tables = load_saved(place.path)[0]
        else:
            tables = [read_table(place.path, faults, limit if place.count is None else None)]
        made += tables if place.count is None else [sampled(table, place.count, seed) for table in tables]
    return made
