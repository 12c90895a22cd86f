"""Tokens and the label mask: what is learnt is the answer and its end, nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deltatune.data.collate import Collator
from deltatune.data.encode import IGNORE, Encoder, Features, encode
from deltatune.data.formats import Example
from deltatune.errors import DataError

PAIR = Example("red cat", "blue dog sleeps", 1)


@pytest.fixture
def encoder(words):
    return Encoder(words, "causal", max_length=32, max_target_length=16, separator=" :")


def spoken(words, features: Features) -> str:
    return words.decode([label for label in features.labels if label != IGNORE])


def test_causal_labels_cover_the_answer_and_its_end_only(words, encoder):
    features, cut = encoder(PAIR)
    assert words.decode(features.input_ids) == "red cat : blue dog sleeps </s>"
    assert spoken(words, features) == "blue dog sleeps </s>"
    assert features.labels[:3] == [IGNORE] * 3
    assert features.targets == 4
    assert not cut


def test_the_whole_row_is_learnt_when_asked_for(words, encoder):
    features, _ = replace(encoder, answer_only=False)(PAIR)
    assert spoken(words, features) == "cat : blue dog sleeps </s>"  # the first token has nothing before it
    assert features.targets == 6


def test_plain_text_is_learnt_whole(words, encoder):
    features, _ = encoder(Example("red cat sleeps", None, 1))
    assert words.decode(features.input_ids) == "red cat sleeps </s>"
    assert spoken(words, features) == "cat sleeps </s>"


def test_generation_starts_where_training_did(words, encoder):
    features, _ = encoder(PAIR)
    prompt = encoder.prompt(PAIR.text)
    assert features.input_ids[: len(prompt)] == prompt
    assert all(label == IGNORE for label in features.labels[: len(prompt)])


def test_a_long_question_is_cut_at_its_start_and_the_answer_kept(words, encoder):
    features, cut = replace(encoder, max_length=6)(Example("old new red cat", "blue dog", 1))
    assert words.decode(features.input_ids) == "red cat : blue dog </s>"
    assert cut


def test_a_long_answer_is_cut_at_its_end(words, encoder):
    features, cut = replace(encoder, max_target_length=2)(PAIR)
    assert spoken(words, features) == "blue dog"
    assert cut


def test_an_answer_of_a_causal_row_is_cut_only_where_the_row_is_too_long(words):
    """A model whose long answers all lose their ends would never learn to stop."""
    made = Encoder(words, "causal", max_length=300, separator=" :")
    features, cut = made(Example("red", "cat " * 200, 1))
    assert not cut
    assert spoken(words, features) == "cat " * 200 + "</s>"
    long, cut = replace(made, max_length=20)(Example("red " * 30, "cat " * 30, 1))
    assert cut
    assert words.decode(long.input_ids) == " ".join(["red"] * 9 + [":"] + ["cat"] * 10)  # half of it each
    short, _ = replace(made, max_length=20)(Example("red " * 3, "cat " * 30, 1))
    assert words.decode(short.input_ids) == " ".join(["red"] * 3 + [":"] + ["cat"] * 16)
    assert made.answer_length == 128  # what is written


def test_a_prompt_that_is_too_long_leaves_room_for_an_answer(words, encoder):
    prompt = replace(encoder, max_length=20, max_target_length=6).prompt("red " * 30)
    assert words.decode(prompt) == "red " * 13 + ":"
    assert len(replace(encoder, max_length=20).prompt("red " * 30)) == 10  # never more than half


def test_seq2seq_labels_are_the_target_with_its_end(words):
    features, _ = Encoder(words, "seq2seq", 32, 16)(PAIR)
    assert words.decode(features.input_ids) == "red cat </s>"
    assert words.decode(features.labels) == "blue dog sleeps </s>"
    assert features.targets == 4
    short, cut = Encoder(words, "seq2seq", 2, 16)(PAIR)
    assert words.decode(short.input_ids) == "red </s>"  # the end stays, or the encoder never sees one
    assert cut


def test_a_token_the_model_has_no_embedding_for_is_told(words, encoder):
    with pytest.raises(DataError, match=r"rows line 1: token \d+ but the model has only 5 embeddings"):
        encode([PAIR], encoder, "rows", vocabulary=5)


def test_a_row_with_nothing_to_learn_is_told(words, encoder):
    with pytest.raises(DataError, match="rows line 4: nothing is left to learn"):
        encode([Example("red", None, 4)], replace(encoder, max_length=1), "rows", None)


def test_batches_are_as_long_as_their_longest_row_and_padding_is_masked():
    rows = [Features([5, 6, 7], [IGNORE, 6, 7], 2), Features([8], [8], 1)]
    batch = Collator(0, "causal")(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7], [8, IGNORE, IGNORE]]
    assert Collator(0, "causal").inputs([[5, 6], [8]], left=True)["input_ids"].tolist() == [[5, 6], [0, 8]]


def test_the_end_token_is_learnt_even_where_it_is_the_padding_token(words):
    """Masking labels by the padding id would unlearn stopping where a tokenizer pads with its end token."""
    features, _ = Encoder(words, "causal", 32, 16)(PAIR)
    batch = Collator(words.eos_token_id, "causal")([features, Features([4], [IGNORE], 0)])
    assert batch["labels"][0, -1] == words.eos_token_id
    assert batch["labels"][1, 1:].eq(IGNORE).all()
