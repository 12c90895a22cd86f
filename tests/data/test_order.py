"""The order of rows: every row once an epoch, and any position found again without what came before."""

from __future__ import annotations

import pytest

from deltatune.data.order import Order


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize(("rows", "micro", "accumulation", "processes"), [(10, 3, 1, 1), (23, 2, 2, 1), (23, 2, 3, 2)])
def test_every_row_comes_once_an_epoch(by_length, rows, micro, accumulation, processes):
    order = Order([i % 7 for i in range(rows)], 5, micro, accumulation, processes, by_length)
    epoch = order.epoch(2)
    parts = [order.step(epoch, i, p) for i in range(order.steps_per_epoch) for p in range(processes)]
    seen = [row for step in parts for batch in step for row in batch]
    assert sorted(seen) == list(range(rows))
    assert max(len(batch) for step in parts for batch in step) <= micro
    assert max(len(step) for step in parts) <= accumulation


def test_the_order_depends_on_seed_and_epoch_and_nothing_else():
    import torch

    order = Order([1] * 50, 5, 4)
    first = order.epoch(3)
    torch.manual_seed(99)
    assert Order([1] * 50, 5, 4).epoch(3) == first
    assert order.epoch(4) != first
    assert Order([1] * 50, 6, 4).epoch(3) != first


def test_processes_share_a_step_without_overlap():
    order = Order([1] * 16, 5, 2, 2, 2)
    epoch = order.epoch(0)
    zero, one = order.step(epoch, 0, 0), order.step(epoch, 0, 1)
    assert {r for b in zero for r in b}.isdisjoint(r for b in one for r in b)
    assert sum(len(b) for b in zero + one) == 8


def test_grouping_by_length_pads_less():
    lengths = [(i * 37) % 100 + 1 for i in range(400)]

    def padded(order: Order) -> int:
        epoch = order.epoch(0)
        batches = [b for i in range(order.steps_per_epoch) for b in order.step(epoch, i)]
        return sum(max(lengths[r] for r in batch) * len(batch) for batch in batches)

    assert padded(Order(lengths, 1, 8, by_length=True)) < 0.7 * padded(Order(lengths, 1, 8))
