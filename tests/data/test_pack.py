"""Packs: every row once, none seen by another, filled well."""

from __future__ import annotations

import random

import pytest

from deltatune.data.collate import Collator
from deltatune.data.features import IGNORE, Features
from deltatune.data.pack import Pack, packed


def row(*tokens: int) -> Features:
    return Features(list(tokens), [IGNORE, *tokens[1:]], len(tokens) - 1)


def test_a_pack_is_its_rows_with_positions_that_begin_anew():
    pack = Pack.of([row(5, 6, 7), row(8, 9)])
    assert pack.input_ids == [5, 6, 7, 8, 9]
    assert pack.positions == [0, 1, 2, 0, 1]
    assert pack.labels == [IGNORE, 6, 7, IGNORE, 9]  # nothing is predicted across the border
    assert (pack.targets, pack.rows) == (3, 2)


@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_in_one_pack_and_no_pack_is_too_long(seed):
    draw = random.Random(seed)
    rows = [row(*range(i * 100, i * 100 + draw.randint(1, 30))) for i in range(60)]
    packs = packed(rows, 32)
    assert sorted(t for pack in packs for t in pack.input_ids) == sorted(t for r in rows for t in r.input_ids)
    assert sum(pack.rows for pack in packs) == 60
    assert max(pack.length for pack in packs) <= 32
    assert sum(pack.targets for pack in packs) == sum(r.targets for r in rows)
    least = -(-sum(r.length for r in rows) // 32)
    assert len(packs) <= least * 11 / 9 + 1  # best fit decreasing
    assert packed(rows, 32) == packs


def test_a_batch_of_packs_has_no_mask_and_what_fills_it_up_is_a_sequence_of_its_own():
    batch = Collator(0, "causal")([Pack.of([row(5, 6, 7), row(8, 9)]), Pack.of([row(4, 3)])])
    assert set(batch) == {"input_ids", "position_ids", "labels"}
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7, IGNORE, 9], [IGNORE, 3, IGNORE, IGNORE, IGNORE]]


def test_flash_kernels_get_one_row():
    batch = Collator(0, "causal", flat=True)([Pack.of([row(5, 6, 7), row(8, 9)]), Pack.of([row(4, 3)])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
