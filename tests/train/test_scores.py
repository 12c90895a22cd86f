"""Scores against the packages that define them, and against numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch

from deltatune.errors import DataError
from deltatune.evaluate import (
    accuracy,
    answer,
    bleu,
    bracketed_slots,
    dataset_loss,
    exact_match,
    macro_f1,
    present_share,
    rouge_l,
    swapped,
    swapped_score,
)
from tests.train import toys

OUTPUTS = ["The Vaults is a cheap pub.", "a blue cat sleeps in the house", "nothing in common"]
REFERENCES = [
    ["The Vaults pub is cheap.", "There is a cheap pub, The Vaults."],
    ["the blue cat sleeps in a house"],
    ["Zizzi serves food", "Food at Zizzi", "Zizzi"],
]


def test_rouge_l_is_the_packages_with_the_best_reference():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    best = [max(scorer.score(r, out)["rougeL"].fmeasure for r in refs) for out, refs in zip(OUTPUTS, REFERENCES)]
    assert rouge_l(OUTPUTS, REFERENCES) == pytest.approx(100 * sum(best) / 3)


def test_bleu_takes_rows_with_different_numbers_of_references():
    import sacrebleu

    single = [[refs[0]] for refs in REFERENCES]
    assert bleu(OUTPUTS, single) == pytest.approx(sacrebleu.corpus_bleu(OUTPUTS, [[r[0] for r in single]]).score)
    assert bleu([refs[-1] for refs in REFERENCES], REFERENCES) == pytest.approx(100)
    assert bleu(OUTPUTS, REFERENCES) > bleu(OUTPUTS, single)


def test_exact_match_counts_any_reference():
    assert exact_match(["a ", "b", "c"], [["x", "a"], ["y"], ["c"]]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("score", [bleu, rouge_l, exact_match])
def test_scores_refuse_rows_that_do_not_match(score):
    for outputs, references in (([], []), (["a"], []), (["a"], [[]])):
        with pytest.raises(DataError):
            score(outputs, references)


def test_macro_f1_and_accuracy_by_hand_and_as_scikit_learn_has_them():
    predicted, true = [0, 0, 1, 2, 2, 1], [0, 1, 1, 2, 0, 1]
    assert accuracy(predicted, true) == pytest.approx(4 / 6)
    metrics = pytest.importorskip("sklearn.metrics")
    assert macro_f1(predicted, true) == pytest.approx(metrics.f1_score(true, predicted, average="macro"))


def test_slots_that_appear_are_counted_as_whole_words():
    assert bracketed_slots("name[The Vaults], near[Café Adriatic]") == {"name": "The Vaults", "near": "Café Adriatic"}
    values = [["The Vaults", "Café Adriatic"], ["cat"]]
    assert present_share(["the vaults, at cafe adriatic", "concatenate"], values) == pytest.approx(1 / 3)
    assert present_share(["THE VAULTS by Café Adriatic!", "a cat"], values) == 1


def test_swapping_always_gives_another_inputs_row():
    inputs = ["a", "a", "a", "b", "c"]
    partners = swapped(list(range(5)), inputs)
    assert all(inputs[j] != inputs[i] for i, j in enumerate(partners))
    with pytest.raises(DataError):
        swapped([1, 2], ["a", "a"])


def test_outputs_that_ignore_their_input_score_the_same_swapped():
    references, inputs = [["red cat"], ["blue dog"], ["old bird"], ["new fish"]], list("abcd")
    faithful = ["red cat", "blue dog", "old bird", "new fish"]
    assert exact_match(faithful, references) == 1
    assert swapped_score(exact_match, faithful, references, inputs) == 0
    constant = ["red cat"] * 4
    assert swapped_score(exact_match, constant, references, inputs) == exact_match(constant, references)


def test_the_loss_of_a_data_set_does_not_depend_on_its_batches(tmp_path):
    from transformers import AutoModelForSeq2SeqLM

    from deltatune.data.collate import Collator
    from deltatune.data.encode import Encoder
    from deltatune.data.formats import Example

    model = AutoModelForSeq2SeqLM.from_pretrained(toys.t5(tmp_path / "t5")).train()
    encoder = Encoder(toys.tokenizer(), "seq2seq", 32, 16)
    rows = [encoder(Example(row["input"], row["target"], 1))[0] for row in toys.pairs(7)]
    collate = Collator(0, "seq2seq")
    device = torch.device("cpu")
    one = dataset_loss(model, [collate(rows)], "seq2seq", device)
    many = dataset_loss(model, [collate(rows[i : i + 2]) for i in range(0, 7, 2)], "seq2seq", device)
    assert many.mean == pytest.approx(one.mean, rel=1e-5)
    assert one.targets == many.targets == sum(row.targets for row in rows)
    assert model.training  # as it was
    assert math.isfinite(one.mean)


def test_batched_answers_equal_single_ones(tmp_path):
    """Left padding of a decoder must not change what it says."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(toys.llama(tmp_path / "llama"))
    words = toys.tokenizer()
    prompts = [words(row["input"])["input_ids"][:-1] for row in toys.pairs(6)]
    options = {"causal": True, "max_new_tokens": 5}
    together = answer(model, words, prompts, batch_size=4, **options)
    alone = [answer(model, words, [prompt], **options)[0] for prompt in prompts]
    assert together == alone
    assert any(together)
