"""Tagged words: rows that do not keep to it, and labels that stand at the first token of their word."""

from __future__ import annotations

import pytest

from deltatune.data.collate import Collator
from deltatune.data.encode import IGNORE, Encoder, check_tokenizer
from deltatune.data.formats import detect, examples
from deltatune.data.labels import Labels
from deltatune.data.prepare import prepare
from deltatune.data.read import table_of
from deltatune.data.tagging import Tagged, word_tokens
from deltatune.errors import ConfigError, DataError
from tests.train import toys

TAGS = ("B-animal", "I-animal", "O")
ROW = {"tokens": ["the", "redcat", "sleeps"], "tags": ["O", "B-animal", "O"]}


def checked(*rows):
    table = table_of(rows)
    return examples(table, detect(table, "token_classification"))


@pytest.fixture
def encoder():
    return Encoder(toys.pieces(), "token_classification", max_length=16, max_target_length=8, labels=Labels(TAGS, TAGS))


def test_words_and_tags_are_recognised_by_several_names():
    for words, tags in (("tokens", "tags"), ("words", "ner_tags"), ("tokens", "labels")):
        (example,) = checked({words: ["a", "b"], tags: ["O", "B-x"]})
        assert (example.words, example.tags, example.text) == (("a", "b"), ("O", "B-x"), "a b")
    table = table_of([{"w": ["a"], "t": ["O"], "tokens": ["c"], "tags": ["O"]}])
    columns = detect(table, "token_classification", text_column="w", label_column="t")
    assert examples(table, columns)[0].words == ("a",)


def test_tags_may_be_numbers():
    corpus = prepare(table_of([{"tokens": ["a", "b"], "tags": [10, 9]}]), None, None, "token_classification")
    assert corpus.labels is not None and corpus.labels.keys == ("9", "10")


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "field 'tags' has 1 tags for 2 words; expected a tag for each word"),
        ({"tokens": ["a"], "tags": ["O", "O"]}, "field 'tags' has 2 tags for 1 words"),
        ({"tokens": "a b", "tags": ["O"]}, "field 'tokens' is 'a b' of type str; expected a list of words"),
        ({"tokens": ["a"], "tags": None}, "field 'tags' is null; expected a list with a tag for each word"),
        ({"tokens": [], "tags": []}, "field 'tokens' is empty"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "field 'tokens' has ' ' of type str as word 2"),
        ({"tokens": ["a", None], "tags": ["O", "O"]}, "field 'tokens' has null as word 2"),
        ({"tokens": ["a"], "tags": [1.5]}, "field 'tags' has 1.5 of type float as tag 1; expected names"),
        ({"tokens": ["a"]}, "field 'tags' is missing"),
    ],
)
def test_a_faulty_row_is_told_by_row_and_field(bad, told):
    with pytest.raises(DataError) as caught:
        checked(ROW, bad)
    assert f"row 2: {told}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tag_that_training_never_saw_is_refused_before_training():
    train = table_of([ROW])
    with pytest.raises(DataError, match="eval line 1: label 'B-plant' never occurs in the training data"):
        prepare(train, table_of([{"tokens": ["a"], "tags": ["B-plant"]}], "eval"), None, "token_classification")


def test_labels_stand_at_the_first_token_of_each_word(encoder):
    (example,) = checked(ROW)
    features, cut = encoder(example)
    assert encoder.tokenizer.convert_ids_to_tokens(features.input_ids) == [
        "[CLS]", "the", "red", "##cat", "sleeps", "[SEP]",
    ]  # fmt: skip
    assert features.labels == [IGNORE, 2, 0, IGNORE, 2, IGNORE]
    assert (features.words, features.targets, cut) == ((0, 1, 2), 3, False)


def test_a_long_row_is_cut_and_keeps_its_closing_token(encoder):
    (example,) = checked(ROW)
    features, cut = Encoder(encoder.tokenizer, encoder.task, 4, 8, labels=encoder.labels)(example)
    assert encoder.tokenizer.convert_ids_to_tokens(features.input_ids) == ["[CLS]", "the", "red", "[SEP]"]
    assert (features.labels, features.words, cut) == ([IGNORE, 2, 0, IGNORE], (0, 1), True)


def test_tokenizers_that_count_the_space_into_a_word_give_the_same_words(tmp_path):
    """Byte-level BPE has the space before a word in its token."""
    words = ["a", "bb", "a"]
    assert word_tokens(toys.byte_pieces(), words)[1] == [0, 1, None, 2]
    assert word_tokens(toys.pieces(), ["the", "redcat", "the"])[1] == [None, 0, 1, None, 2, None]


def test_a_word_without_a_token_of_its_own_has_no_label(encoder):
    example = Tagged("the \u200b cat", None, 1, ("the", "\u200b", "cat"), ("O", "B-animal", "I-animal"))
    features, _ = encoder(example)
    assert features.words == (0, 2)
    assert [label for label in features.labels if label != IGNORE] == [2, 1]


def test_a_batch_ignores_padding(encoder):
    rows = [encoder(example)[0] for example in checked(ROW, {"tokens": ["the"], "tags": ["O"]})]
    batch = Collator(0, "token_classification")(rows)
    assert batch["labels"].tolist()[1] == [IGNORE, 2, IGNORE, IGNORE, IGNORE, IGNORE]


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ConfigError, match="needs a fast tokenizer, object is none"):
        check_tokenizer(object(), "token_classification")
    check_tokenizer(object(), "classification")
