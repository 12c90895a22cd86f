"""Scores as sums over rows are the scores; intervals of known distributions are theirs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltatune.evaluate import (
    accuracy,
    bleu,
    exact_match,
    macro_f1,
    rouge_l,
    rouge_n,
    squad_exact_match,
    squad_f1,
    tag_scores,
)
from deltatune.scoring.bootstrap import Draws
from deltatune.scoring.sums import answer_scores, class_scores, loss_scores, mean_of, tagged_scores, text_scores

CLASSES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30)
BIO = ["O", "B-a", "I-a", "B-b", "I-b"]
SENTENCE = st.lists(st.sampled_from(["the", "a", "cat", "sat", "on", "mat"]), max_size=8).map(" ".join)
ROWS = st.lists(st.tuples(SENTENCE, st.lists(SENTENCE, min_size=1, max_size=3)), min_size=1, max_size=6)


@given(CLASSES)
def test_class_scores_are_those_of_the_functions(pairs):
    predicted, true = [p for p, _ in pairs], [t for _, t in pairs]
    found = class_scores(predicted, true, 5)
    assert found["accuracy"].value == pytest.approx(accuracy(predicted, true))
    assert found["macro_f1"].value == pytest.approx(macro_f1(predicted, true))


@pytest.mark.parametrize("names", [BIO, ["noun", "verb", "other"]])
def test_tag_scores_are_those_of_the_function(names):
    generator = np.random.default_rng(0)
    rows = [generator.choice(names, size=(2, length)).tolist() for length in generator.integers(1, 9, size=40)]
    said, true = [row[0] for row in rows], [row[1] for row in rows]
    expected = tag_scores(said, true)
    found = tagged_scores(said, true)
    assert {name: score.value for name, score in found.items()} == pytest.approx(expected)
    assert len(expected) in (2, 4)


@settings(max_examples=40)
@given(ROWS)
def test_text_scores_are_those_of_the_functions(rows):
    outputs, references = [row[0] for row in rows], [row[1] for row in rows]
    found = {name: score.value for name, score in text_scores(outputs, references).items()}
    assert found["bleu"] == pytest.approx(bleu(outputs, references))
    assert found["exact_match"] == pytest.approx(exact_match(outputs, references))
    assert found["rouge_l"] == pytest.approx(rouge_l(outputs, references))
    assert found["rouge_1"] == pytest.approx(rouge_n(outputs, references, 1))
    spans = {name: score.value for name, score in answer_scores(outputs, references).items()}
    assert spans["f1"] == pytest.approx(squad_f1(outputs, references))
    assert spans["exact_match"] == pytest.approx(squad_exact_match(outputs, references))


@settings(max_examples=40)
@given(SENTENCE, SENTENCE, st.sampled_from([1, 2]))
def test_rouge_n_is_that_of_the_rouge_score_package(output, reference, n):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer([f"rouge{n}"])
    expected = scorer.score(reference, output)[f"rouge{n}"].fmeasure
    assert rouge_n([output], [[reference]], n) == pytest.approx(100 * expected)


def test_the_loss_counts_targets_not_rows():
    rows = [(2.0, 1), (3.0, 9)]
    assert loss_scores(rows, perplexity=True)["loss"].value == 0.5
    assert loss_scores(rows, perplexity=True)["perplexity"].value == pytest.approx(np.exp(0.5))


def test_an_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    found = Draws(400, 2000).interval(mean_of(values.tolist()))
    half = 1.96 * values.std() / np.sqrt(400)  # the central limit theorem
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)


def test_a_difference_is_over_the_same_draws():
    hard = np.random.default_rng(0).normal(0.0, 10.0, size=200)
    one, two = mean_of(hard.tolist()), mean_of((hard + 0.5).tolist())
    found = Draws(200).difference(two, one)
    assert (found.low, found.value, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert found.away_from_zero


def test_draws_are_repeated_by_their_seed():
    score = mean_of([0.0, 1.0, 5.0, 2.0])
    assert Draws(4, seed=3).interval(score) == Draws(4, seed=3).interval(score) != Draws(4, seed=4).interval(score)
