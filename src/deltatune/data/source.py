"""Which tables a run trains and evaluates on: files, a dataset of the `datasets` library, or rows in memory."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from deltatune.data.read import Table, read_table, table_of
from deltatune.errors import DataError

Rows = Iterable[dict[str, Any]]


def load_tables(
    train: str | Rows | None,
    evaluation: str | Rows | None,
    test: str | Rows | None,
    dataset: str | None,
    dataset_config: str | None,
    eval_split: float,
    seed: int,
) -> tuple[Table, Table | None, Table | None]:
    """(train, evaluation, test). Without evaluation rows a share of the training rows is set aside."""
    if dataset is not None:
        table, held_out = load_dataset(dataset, dataset_config)
    elif train is None:
        raise DataError(
            "no training data: set train_file (a local file) or dataset (a name of the datasets library)",
            field="train_file",
            expected="a file",
        )
    else:
        table, held_out = _table(train, "train rows"), None
    held_out = _table(evaluation, "eval rows") if evaluation is not None else held_out
    final = _table(test, "test rows") if test is not None else None
    if held_out is None and eval_split > 0:
        table, held_out = split(table, eval_split, seed)
    return table, held_out, final


def split(table: Table, share: float, seed: int) -> tuple[Table, Table]:
    """Set a random share aside; the same rows for the same seed, in the order of the file."""
    count = max(1, round(len(table) * share))
    if count >= len(table):
        raise DataError(
            f"{table.source} has {len(table)} rows: eval_split={share} leaves none to train on; "
            "give more rows, or eval_split: 0",
            path=table.source,
            field="eval_split",
            found=share,
        )
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed)).tolist()
    aside = set(order[:count])
    kept = [i for i in range(len(table)) if i not in aside]
    return table.take(kept, f"train of {share} {seed}"), table.take(sorted(aside), f"eval of {share} {seed}")


def load_dataset(name: str, config: str | None = None) -> tuple[Table, Table | None]:
    """A local file, or the train and validation splits of a dataset of the `datasets` library."""
    if Path(name).is_file():
        return read_table(name), None
    try:
        import datasets  # pyright: ignore[reportMissingImports]  (optional)
    except ImportError as error:
        raise DataError(
            f"dataset {name!r} is no local file, and the package datasets is not installed; pip install datasets",
            field="dataset",
            found=name,
        ) from error
    try:
        loaded: Any = datasets.load_dataset(name, config)
    except Exception as error:  # the library and the hub client raise many unrelated kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"dataset {name!r} cannot be loaded: {reason}", field="dataset", found=name) from error
    if "train" not in loaded:
        raise DataError(
            f"dataset {name!r} has no split 'train', only {sorted(map(str, loaded))}", field="dataset", found=name
        )
    held_out = next((loaded[s] for s in ("validation", "dev", "eval") if s in loaded), None)
    return table_of(loaded["train"], f"{name}[train]"), (
        None if held_out is None else table_of(held_out, f"{name}[validation]")
    )


def _table(source: str | Rows, name: str) -> Table:
    return read_table(source) if isinstance(source, str | Path) else table_of(source, name)
