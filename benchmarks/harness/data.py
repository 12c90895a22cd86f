"""The data sets, checked by the hash of their content: figures are comparable on the same rows only."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from deltatune.data import read_table
from deltatune.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[2]

# sha256 of the decompressed files
HASHES = {
    "e2e/train": "9f5ca5b494631a6077e8c4f4fc361a5e1640afc05636631406d8134b2a74bf75",
    "e2e/dev": "c31f4e6ba40a7fac6068ded87d243b87b25d8fac08a4f08e883494522ad4c375",
    "e2e/test": "8dbaab14ebffbf5571881d19c68bef7226be5168e786cd81bceb997507c5a767",
    "sentence_polarity/train": "3fb9f7bd0ff267c092f2b838ae638730525e658f561d5bd9ab4d47a6920161ef",
    "sentence_polarity/test": "d33d135964380e66b283792d38b397c0340732842a9723259b41acb124bb0930",
    "banking77/train": "3c037e182c474220a7cccfc40a56f03411e42654995f020596889765292a3df0",
    "banking77/test": "31621b19283c6447ebd247708eab00799bb09c308c06e8ce25a354d74623ea44",
    "wnut17/train": "aec46fa8c24ed7b1d6cd7e3ed7cc83ca4b3fe87177290a30df9ac4aa23fc11b9",
    "wnut17/dev": "d06adf4ce6b51ddcb865eca9c84753449ae1f877629a250cfb56d0c31db3b78f",
    "wnut17/test": "f4ea34dd94bfcb2248f66b6ea760a27e1555f54e52d27d71465a0bf1ba5c81a5",
    "squad_newwiki/all": "9acfd2147cee0ba897430b18f7007e574597319c9228951a055e5ba28bd64941",
    "text/tiny_shakespeare": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
}

Row = dict[str, Any]
Item = TypeVar("Item")


def data_folder() -> Path:
    """`$DELTATUNE_SHARED/data`, else `shared/data` beside the repository."""
    shared = os.environ.get("DELTATUNE_SHARED")
    return (Path(shared) if shared else REPOSITORY.parent / "shared") / "data"


@cache
def rows(part: str) -> tuple[Row, ...]:
    """All rows of a part such as `e2e/train`.

    Raises:
        DataError: The file is not there, or holds something else than the figures were measured on.
    """
    path = data_folder() / f"{part}.jsonl.gz"
    if not path.is_file():
        raise DataError(
            f"data file {path} does not exist; set DELTATUNE_SHARED to the folder that holds data/{part}.jsonl.gz",
            path=str(path),
        )
    table = read_table(path)
    if table.digest != HASHES[part]:
        raise DataError(
            f"data file {path} has sha256 {table.digest[:12]}... once decompressed, expected {HASHES[part][:12]}...; "
            "figures on other rows do not compare",
            path=str(path),
            found=table.digest,
            expected=HASHES[part],
        )
    return tuple(table.rows)


def split(whole: tuple[Row, ...], dev: int, train: int) -> tuple[list[Row], list[Row]]:
    """(train, dev): disjoint, drawn once and for all, the same for every method and seed."""
    if dev + train > len(whole):
        raise DataError(
            f"{dev} dev and {train} training rows asked of {len(whole)}", found=len(whole), expected=dev + train
        )
    order = list(range(len(whole)))
    random.Random("train and dev").shuffle(order)
    return [whole[i] for i in order[dev : dev + train]], [whole[i] for i in order[:dev]]


def split_by(whole: Sequence[Row], field: str, shares: Sequence[int]) -> list[list[Row]]:
    """Rows in parts that have no value of `field` in common; `shares[i]` is how many values part i gets.

    Drawn once and for all. For articles: questions about one article are never in two parts.
    """
    values = sorted({row[field] for row in whole})
    if sum(shares) > len(values):
        raise DataError(f"{sum(shares)} values of {field} asked of {len(values)}", field=field, found=len(values))
    random.Random(f"parts by {field}").shuffle(values)
    parts, taken = [], 0
    for share in shares:
        mine = set(values[taken : taken + share])
        parts.append([row for row in whole if row[field] in mine])
        taken += share
    return parts


def spread_over(whole: Sequence[Item], count: int) -> list[Item]:
    """`count` items at equal distances (all when there are fewer): files are often sorted by label."""
    if count >= len(whole):
        return list(whole)
    return [whole[i * len(whole) // count] for i in range(count)]
