"""Candidates take turns, and what is told of their times is what was measured."""

from __future__ import annotations

import pytest
from harness.timing import beside, in_turns, milliseconds, ratio, summary, with_spread


def test_candidates_take_turns_in_changing_order_and_the_first_round_does_not_count():
    order = []
    found = in_turns({name: lambda name=name: order.append(name) or len(order) for name in "abc"}, rounds=2)
    assert order == list("cab") + list("abc") + list("bca")
    assert found == {"a": [4, 9], "b": [5, 7], "c": [6, 8]}


def test_each_runs_within_its_own_context():
    entered = []

    class Inside:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            entered.append(self.name)

        def __exit__(self, *_):
            entered.append("left")

    in_turns({"a": lambda: None}, rounds=0, within=Inside)
    assert entered == ["a", "left"]


def test_ratios_are_taken_within_a_round():
    spent = {"ours": [1.0, 20.0, 3.0], "floor": [1.0, 10.0, 2.0]}  # the second round was ten times slower for all
    assert ratio(spent, "ours", "floor") == 1.5
    found = beside(spent, "floor")
    assert found["ours"]["ratio"] == {"median": 1.5, "low": 1.25, "high": 1.75, "best": 1.0}
    assert found["floor"]["ratio"]["median"] == 1 and found["floor"]["seconds"]["best"] == 1.0


@pytest.mark.parametrize(("values", "low", "high"), [([2.0], 2.0, 2.0), ([1.0, 3.0], 1.5, 2.5)])
def test_a_summary_has_the_quartiles(values, low, high):
    assert summary(values) == {"median": 2.0, "low": low, "high": high, "best": min(values)}


def test_cells_of_tables():
    assert milliseconds(0.00012) == "0.12 ms" and milliseconds(1.5) == "1,500.0 ms"
    assert with_spread({"median": 1.2, "low": 1.111, "high": 1.3}) == "1.20 (1.11 to 1.30)"
    assert with_spread(None) == ""
