"""Datasets of the `datasets` library: by name, or in a folder that it saved. The library is imported only here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltatune.data.read import Table, read_table, table_of
from deltatune.errors import DataError

HELD_OUT = ("validation", "dev", "eval")  # names of the split to evaluate on
_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves


def is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _SAVED)


def load_dataset(name: str, config: str | None = None) -> tuple[list[Table], list[Table]]:
    """A local file or saved folder, or the train and validation splits of a dataset with that name."""
    if Path(name).is_file():
        return [read_table(name)], []
    if is_saved(Path(name)):
        return load_saved(Path(name))
    library = _library(name)
    try:
        loaded: Any = library.load_dataset(name, config)
    except Exception as error:  # the library and the hub client raise many unrelated kinds
        raise _unloadable(name, error) from error
    return _splits(loaded, name)


def load_saved(folder: Path) -> tuple[list[Table], list[Table]]:
    """What `save_to_disk` wrote: one dataset, or several splits."""
    library = _library(str(folder))
    try:
        loaded = library.load_from_disk(str(folder))
    except Exception as error:  # Arrow's kinds and the library's own
        raise _unloadable(str(folder), error) from error
    if isinstance(loaded, library.Dataset):
        return [table_of(_named(loaded), str(folder))], []
    return _splits(loaded, str(folder))


def _splits(loaded: Any, name: str) -> tuple[list[Table], list[Table]]:
    if "train" not in loaded:
        raise DataError(
            f"dataset {name!r} has no split 'train', only {sorted(map(str, loaded))}", field="dataset", found=name
        )
    held_out = next((split for split in HELD_OUT if split in loaded), None)
    train = table_of(_named(loaded["train"]), f"{name}[train]")
    return [train], [] if held_out is None else [table_of(_named(loaded[held_out]), f"{name}[{held_out}]")]


def _named(dataset: Any) -> Any:
    """Rows whose classes are names instead of numbers, where the dataset knows them."""
    classes = {}
    for column, feature in dataset.features.items():
        inner = getattr(feature, "feature", feature)  # of a list of classes
        if hasattr(inner, "int2str"):
            classes[column] = inner.int2str
    for row in dataset:
        yield {
            key: value if key not in classes or value is None else _names(value, classes[key])
            for key, value in row.items()
        }


def _names(value: Any, name: Any) -> Any:
    if isinstance(value, list):
        return [_names(each, name) for each in value]
    return name(value) if value >= 0 else value  # -1 marks a row without a label


def _library(name: str) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]  (optional)
    except ImportError as error:
        raise DataError(
            f"dataset {name!r} is no local file, and the package datasets is not installed; "
            "pip install 'deltatune[data]'",
            field="dataset",
            found=name,
        ) from error
    return datasets


def _unloadable(name: str, error: Exception) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"dataset {name!r} cannot be loaded: {reason}", field="dataset", found=name)
