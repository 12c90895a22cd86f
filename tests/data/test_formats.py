"""Which columns are what, and rows that do not keep to it."""

from __future__ import annotations

import pytest

from deltatune.data.formats import detect, examples
from deltatune.data.prepare import prepare
from deltatune.data.read import table_of
from deltatune.errors import DataError


@pytest.mark.parametrize(
    ("row", "text", "target"),
    [
        ({"input": "i", "target": "t"}, "i", "t"),
        ({"prompt": "i", "completion": "t"}, "i", "t"),
        ({"instruction": "do", "input": "i", "output": "t"}, "do\ni", "t"),
        ({"instruction": "do", "input": "", "output": "t"}, "do", "t"),
        ({"instruction": "do", "output": "t"}, "do", "t"),
        ({"source": "i", "target": "t"}, "i", "t"),
        ({"mr": "i", "ref": "t"}, "i", "t"),
        ({"question": "i", "answer": "t"}, "i", "t"),
        ({"id": 3, "input": "i", "target": "t"}, "i", "t"),
    ],
)
@pytest.mark.parametrize("task", ["seq2seq", "causal"])
def test_pairs_are_recognised(task, row, text, target):
    table = table_of([row])
    (example,) = examples(table, detect(table, task))
    assert (example.text, example.target) == (text, target)


def test_text_and_label_are_recognised_and_named():
    table = table_of([{"text": "a", "label": 1, "label_name": "good"}, {"text": "b", "label": 0, "label_name": "bad"}])
    corpus = prepare(table, None, None, "classification")
    assert corpus.labels is not None
    assert corpus.labels.keys == ("0", "1")
    assert corpus.labels.names == ("bad", "good")


def test_labels_may_be_words_and_numbers_sort_as_numbers():
    corpus = prepare(table_of([{"text": "a", "label": f"{i}"} for i in (10, 9, 2)]), None, None, "classification")
    assert corpus.labels is not None and corpus.labels.keys == ("2", "9", "10")
    corpus = prepare(table_of([{"text": "a", "label": i} for i in ("pos", "neg")]), None, None, "classification")
    assert corpus.labels is not None and corpus.labels.keys == ("neg", "pos")


def test_plain_text_is_for_causal_models_only():
    table = table_of([{"text": "a b c"}])
    assert detect(table, "causal").form == "text"
    with pytest.raises(DataError, match="are no known format"):
        detect(table, "seq2seq")


def test_named_columns_win():
    table = table_of([{"input": "i", "target": "t", "long": "l", "short": "s"}])
    columns = detect(table, "seq2seq", input_column="long", target_column="short")
    assert [(e.text, e.target) for e in examples(table, columns)] == [("l", "s")]


def test_a_named_column_that_is_not_there_is_told_with_the_nearest():
    with pytest.raises(DataError, match=r"input_column 'inputs' is not a column .*nearest: 'input'"):
        detect(table_of([{"input": "i", "target": "t"}]), "seq2seq", input_column="inputs")


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"input": "i"}, "row 2: field 'target' is missing"),
        ({"input": "i", "target": None}, "row 2: field 'target' is null"),
        ({"input": "i", "target": 7}, "row 2: field 'target' is 7 of type int; expected text"),
        ({"input": ["i"], "target": "t"}, "row 2: field 'input' is ['i'] of type list; expected text"),
        ({"input": "i", "target": "  "}, "row 2: field 'target' is empty"),
    ],
)
def test_a_faulty_row_is_told_by_row_and_field(bad, told):
    table = table_of([{"input": "i", "target": "t"}, bad, {"input": "i", "target": "t"}])
    with pytest.raises(DataError) as caught:
        examples(table, detect(table, "seq2seq"))
    assert told in str(caught.value)
    assert caught.value.key == "2"
    assert caught.value.field in ("input", "target")


def test_rows_with_the_same_fault_are_counted():
    table = table_of([{"input": "i", "target": "t"}, *[{"input": "i"}] * 3])
    with pytest.raises(DataError, match="2 more rows like it"):
        examples(table, detect(table, "seq2seq"))


@pytest.mark.parametrize("label", [None, "", ["a"], 1.5, {"a": 1}])
def test_rows_without_a_usable_label_are_told(label):
    table = table_of([{"text": "a", "label": 0}, {"text": "b", "label": 1}, {"text": "c", "label": label}])
    with pytest.raises(DataError, match="row 3: field 'label'"):
        prepare(table, None, None, "classification")


def test_one_class_only_is_refused():
    with pytest.raises(DataError, match="every row has the label '0'"):
        prepare(table_of([{"text": "a", "label": 0}] * 2), None, None, "classification")


def test_a_label_that_training_never_saw_is_refused_before_training():
    train = table_of([{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    with pytest.raises(DataError, match="eval line 1: label '2' never occurs in the training data"):
        prepare(train, table_of([{"text": "c", "label": 2}], "eval"), None, "classification")


def test_labels_that_are_numbers_are_told_with_their_names():
    named = [{"text": "a", "label": 0, "label_name": "card"}, {"text": "b", "label": 1, "label_name": "rate"}]
    with pytest.raises(DataError, match=r"label '2' never occurs.*; expected one of 0 \(card\), 1 \(rate\)"):
        prepare(table_of(named), table_of([{"text": "c", "label": 2}], "eval"), None, "classification")


def test_the_task_of_a_row_is_a_number_and_goes_with_the_batch(words):
    made = [{"input": "red", "target": "cat", "t": 1}, {"input": "red", "target": "dog", "t": "0"}]
    corpus = prepare(table_of(made), None, None, "seq2seq", task_column="t")
    encoded = corpus.encode(words, max_length=8, max_target_length=8)
    assert encoded.collator(encoded.train.features)["task_ids"].tolist() == [1, 0]
    assert "task_ids" not in encoded.without_task_ids().collator(encoded.train.features)
    for bad in (None, -1, 1.5, "one", True):
        with pytest.raises(DataError, match=r"row 3: field 't' is .*; expected the number of a task"):
            prepare(table_of([*made, {**made[0], "t": bad}]), None, None, "seq2seq", task_column="t")
