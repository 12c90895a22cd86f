"""Fewer rows out of tables: a random share, a number of them, several tables in given shares. Seeded, order kept."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from deltatune.data.read import Table
from deltatune.errors import DataError


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
    aside = set(_order(len(table), seed)[:count])
    kept = [i for i in range(len(table)) if i not in aside]
    return table.take(kept, f"train of {share} {seed}"), table.take(sorted(aside), f"eval of {share} {seed}")


def sampled(table: Table, count: int, seed: int) -> Table:
    """`count` random rows; where there are fewer, all of them as often as it takes."""
    times, rest = divmod(count, len(table))
    chosen = [*range(len(table))] * times + _order(len(table), seed)[:rest]
    return table.take(sorted(chosen), f"{count} of {seed}")


def mixed(tables: Sequence[Table], weights: Sequence[float], seed: int) -> list[Table]:
    """Each table with its share of all rows: the scarcest appears whole, of the others a random part."""
    if len(weights) != len(tables):
        raise DataError(
            f"data_weights has {len(weights)} weights for {len(tables)} data files "
            f"({', '.join(table.source for table in tables[:4])}); give one for each file",
            field="data_weights",
            found=len(weights),
            expected=len(tables),
        )
    if any(not math.isfinite(weight) or weight <= 0 for weight in weights):
        raise DataError(
            f"data_weights={list(weights)} holds a weight that is not above 0",
            field="data_weights",
            found=list(weights),
        )
    scale = min(len(table) / weight for table, weight in zip(tables, weights))
    counts = [max(1, min(len(table), round(scale * weight))) for table, weight in zip(tables, weights)]
    return [
        table if count == len(table) else table.take(sorted(_order(len(table), seed)[:count]), f"{count} of {seed}")
        for table, count in zip(tables, counts)
    ]


def limited(tables: Sequence[Table], count: int | None) -> list[Table]:
    """The first rows of each table, `count` in all; each table gives by its length."""
    total = sum(len(table) for table in tables)
    if count is None or count >= total:
        return list(tables)
    if len(tables) == 1:
        return [tables[0].head(count)]
    made, seen, given = [], 0, 0
    for table in tables:
        seen += len(table)
        upto = round(count * seen / total)
        if upto > given:
            made.append(table.head(upto - given))
        given = upto
    return made


def _order(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
