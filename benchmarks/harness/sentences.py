"""The rows of the tasks that MiniLM is tuned on: training, dev and test, and a text of them to start a prompt from."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from harness.data import Row, rows, split, split_by, spread_over

# how many of the 48 articles each part gets; none is in two parts
ARTICLES = (30, 6, 12)
TEXT_ROWS, TEXT_WORDS = 8, 40  # whose texts, one after the other, a prompt starts from


def parts_of(task: str, budget: dict[str, Any], both: bool = False) -> dict[str, list[Row]]:
    """`train`, `dev` and `test` rows. With `both`, sentence_polarity shares its training with banking77."""
    test_rows = budget["test_rows"] or sys.maxsize
    if task == "sentence_polarity":
        train, dev = split(rows("sentence_polarity/train"), budget["dev_rows"], budget["train_rows"])
        test = spread_over(rows("sentence_polarity/test"), test_rows)
        return _two_tasks(train, dev, test) if both else {"train": train, "dev": dev, "test": test}
    if task == "wnut17":
        parts = [list(rows(f"wnut17/{name}")) for name in ("train", "dev", "test")]
    else:
        parts = split_by(rows("squad_newwiki/all"), "title", ARTICLES)
    sizes = (budget["train_rows"] or sys.maxsize, budget["dev_rows"] or sys.maxsize, test_rows)
    chosen = [spread_over(part, size) for part, size in zip(parts, sizes)]
    return dict(zip(("train", "dev", "test"), chosen))


def start_text(train: Sequence[Row]) -> str:
    """Texts of some training rows, without their labels."""
    return " ".join(" ".join(_text(row) for row in spread_over(train, TEXT_ROWS)).split()[:TEXT_WORDS])


def _text(row: Row) -> str:
    if "tokens" in row:
        return " ".join(row["tokens"])
    return row["text"] if "text" in row else row["question"]


def _two_tasks(train: list[Row], dev: list[Row], test: list[Row]) -> dict[str, list[Row]]:
    """Every second training row is one of banking77; a class is written with its task: one head has them all."""
    other, _ = split(rows("banking77/train"), 0, len(train) // 2)
    own = [_of_task(row, 0) for row in spread_over(train, len(train) - len(other))]
    mixed = [row for pair in zip(own, (_of_task(row, 1) for row in other)) for row in pair]
    return {"train": mixed, "dev": [_of_task(row, 0) for row in dev], "test": [_of_task(row, 0) for row in test]}


def _of_task(row: Row, number: int) -> Row:
    return {"text": row["text"], "label": f"{number}-{row['label']}", "task": number}
