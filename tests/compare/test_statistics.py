"""Which differences are told from noise: on data of which the truth is known."""

import numpy as np
import pytest

from deltatune.compare.statistics import groups, holm, judge


def scores(means, seeds=3, rows=200, seed_noise=0.02, row_noise=0.3, draw=0):
    """(candidates, seeds, rows): rows that are hard for all, a shift by candidate and seed, and noise of each."""
    random = np.random.default_rng(draw)
    hard = random.normal(size=rows) * 2
    shift = np.asarray(means)[:, None] + seed_noise * random.normal(size=(len(means), seeds))
    return hard + shift[:, :, None] + row_noise * random.normal(size=(len(means), seeds, rows))


def ones(rows=200):
    return np.ones(rows)


def test_a_clear_difference_is_told_although_rows_differ_more_than_candidates():
    found = judge(scores([0.0, 1.0]), ones())
    assert found.undecided is None and found.differ(0, 1) and found.groups == [[0], [1]]
    difference = found.pairs[0].difference
    assert difference.low < -1 < difference.high < 0


def test_equal_candidates_are_called_different_no_more_often_than_the_level_says():
    told = sum(judge(scores([0.0, 0.0], draw=i, rows=60, seed_noise=0.2), ones(60)).differ(0, 1) for i in range(60))
    assert told <= 7  # 5 % of 60 is 3; more than 7 has a probability of about 1 %


def test_seeds_that_disagree_are_noise_however_many_rows_there_are():
    values = np.zeros((2, 3, 2000))
    values[1] += np.array([1.0, -0.6, 0.5])[:, None]  # a mean of 0.3, and no noise of rows at all
    assert not judge(values, ones(2000)).differ(0, 1)


@pytest.mark.parametrize(("seeds", "rows", "reason"), [(1, 200, "one seed"), (3, 12, "12 held-out rows")])
def test_too_little_to_go_by_decides_nothing(seeds, rows, reason):
    found = judge(scores([0.0, 9.0], seeds, rows), ones(rows))
    assert reason in found.undecided and not found.pairs and found.groups == [[0, 1]]
    assert found.scores[1].low is None and found.scores[1].mean == pytest.approx(9, abs=1.5)


def test_the_score_of_a_row_counts_as_often_as_it_has_targets():
    values = np.array([[[0.0, 1.0] * 20]] * 2).repeat(2, axis=1)
    weights = np.array([3.0, 1.0] * 20)
    assert judge(values, weights).scores[0].mean == pytest.approx(0.25)


def test_identical_candidates_do_not_differ():
    one = scores([0.0])
    found = judge(np.concatenate([one, one]), ones())
    assert found.pairs[0].p == 1 and not found.pairs[0].differs


def test_holm_stops_at_the_first_that_stands():
    assert holm([0.04, 0.001, 0.02]) == [True, True, True]
    assert holm([0.04, 0.001, 0.03]) == [False, True, False]


def test_groups_are_the_largest_sets_without_a_difference():
    assert groups(4, [(0, 3)]) == [[0, 1, 2], [1, 2, 3]]
    assert groups(3, [(0, 1), (0, 2), (1, 2)]) == [[0], [1], [2]]
    assert groups(3, [(0, 2), (0, 1)]) == [[0], [1, 2]]
