"""Questions with passages: rows that do not keep to it, windows, and the tokens an answer stands at."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from deltatune.data.collate import Collator
from deltatune.data.encode import IGNORE, Encoder, encode
from deltatune.data.formats import detect, examples
from deltatune.data.passages import Passage, Span, windows
from deltatune.data.read import table_of
from deltatune.errors import ConfigError, DataError
from tests.train import toys

CONTEXT = "the old dog sleeps in the house and the redcat sings on a tree"


def row(answer="redcat", start=None, question="the cat"):
    place = CONTEXT.index(answer) if start is None else start
    return {"id": "1", "question": question, "context": CONTEXT, "answers": [{"text": answer, "start": place}]}


def checked(*rows):
    table = table_of(rows)
    return examples(table, detect(table, "question_answering"))


@pytest.fixture
def encoder():
    return Encoder(toys.pieces(), "question_answering", max_length=32, max_target_length=8)


def spoken(encoder, window):
    start, end = window.labels
    return CONTEXT[window.places[start][0] : window.places[end][1]]


@pytest.mark.parametrize(
    "answers",
    [
        [{"text": "old dog", "start": 4}, {"text": "dog", "start": 8}],
        [{"text": "old dog", "answer_start": 4}, {"text": "dog", "answer_start": 8}],
        {"text": ["old dog", "dog"], "answer_start": [4, 8]},
    ],
)
def test_answers_are_read_in_every_usual_form(answers):
    (example,) = checked({"question": "who\nthen", "context": CONTEXT, "answers": answers})
    assert example.answers == (Span("old dog", 4), Span("dog", 8))
    assert example.text == f"who then\n{CONTEXT}"  # the first line break ends the question
    assert Passage.of(example.text).context == CONTEXT


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (row("dog", 9), "field 'answers' says 'dog' at character 9, where the context has 'og '; expected the text"),
        (row("dog", 900), "field 'answers' says 'dog' at character 900, where the context has ''"),
        ({**row(), "answers": []}, "field 'answers' is empty; expected an answer that stands in the context"),
        ({**row(), "answers": "dog"}, "field 'answers' is 'dog' of type str; expected answers, each with"),
        ({**row(), "answers": [{"text": "dog"}]}, "field 'answers' holds {'text': 'dog'}"),
        ({**row(), "answers": [{"text": "dog", "start": -4}]}, "field 'answers' holds"),
        ({**row(), "answers": {"text": ["dog"], "answer_start": []}}, "field 'answers' holds"),
        ({**row(), "context": " "}, "field 'context' is empty"),
        ({**row(), "question": 3}, "field 'question' is 3 of type int; expected text"),
        ({"question": "a", "context": "b"}, "field 'answers' is missing"),
    ],
)
def test_a_faulty_row_is_told_by_row_and_field(bad, told):
    with pytest.raises(DataError) as caught:
        checked(row(), bad)
    assert f"row 2: {told}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_answers_tokens_are_the_labels(encoder):
    for answer in ("redcat", "the", "sleeps in the house", "tree", "cat", CONTEXT):
        (example,) = checked(row(answer))
        (window,) = windows(encoder, example)
        assert spoken(encoder, window) == answer
        assert window.targets == 1


def test_question_and_context_are_told_apart_and_only_the_context_can_be_an_answer(encoder):
    (example,) = checked(row(question="the old dog"))
    (window,) = windows(encoder, example)
    tokens = encoder.tokenizer.convert_ids_to_tokens(window.input_ids)
    assert tokens[:6] == ["[CLS]", "the", "old", "dog", "[SEP]", "the"]
    assert [place is None for place in window.places[:6]] == [True] * 5 + [False]
    assert window.types == [0] * 5 + [1] * (len(tokens) - 5)
    assert window.places[-1] is None


def test_a_long_context_is_read_in_windows_that_overlap(encoder):
    (example,) = checked(row())
    made = windows(replace(encoder, max_length=12), example, 7)
    assert len(made) > 1 and {window.row for window in made} == {7}
    seen = {i for window in made for place in window.places if place for i in range(*place)}
    assert all(i in seen for i, letter in enumerate(CONTEXT) if letter != " ")
    assert all(set(a.places) & set(b.places) - {None} for a, b in pairwise(made))
    for window in made:
        assert len(window.input_ids) <= 12
        assert window.targets == (window.labels != [IGNORE, IGNORE])
        assert not window.targets or spoken(encoder, window) == "redcat"
    assert any(window.targets for window in made) and not all(window.targets for window in made)


def test_training_takes_one_window_with_the_answer_and_evaluation_all(encoder):
    rows = checked(row(), row("old dog sleeps in the house and the redcat sings"))
    short = replace(encoder, max_length=12)
    train, lengths = encode(rows, short, "rows", None)
    assert [(window.row, window.targets) for window in train] == [(0, 1)]
    assert (lengths.rows, lengths.dropped, lengths.truncated) == (2, 1, 2)
    read, lengths = encode(rows, short, "rows", None, training=False)
    assert len(read) > 2 and lengths.dropped == 0
    with pytest.raises(DataError, match="rows: no answer fits into 12 tokens"):
        encode(rows[1:], short, "rows", None)


def test_a_long_question_is_cut_and_leaves_room_for_the_context(encoder):
    (example,) = checked(row(question="the dog " * 30))
    made = windows(replace(encoder, max_length=16), example)
    assert all(any(place is not None for place in window.places) for window in made)
    assert max(len(window.input_ids) for window in made) == 16
    with pytest.raises(ConfigError, match="max_length=5 leaves no room"):
        windows(replace(encoder, max_length=5), example)


def test_a_batch_has_both_positions_and_token_types(encoder):
    rows, _ = encode(checked(row(), row("old dog", question="dog")), encoder, "rows", None)
    batch = Collator(0, "question_answering")(rows)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "start_positions", "end_positions"}
    assert batch["start_positions"].tolist() == [r.labels[0] for r in rows]
    assert batch["end_positions"].tolist() == [r.labels[1] for r in rows]
    assert batch["token_type_ids"].shape == batch["input_ids"].shape


def test_an_input_without_a_context_is_told():
    with pytest.raises(DataError, match="is no question with a context"):
        Passage.of("who sleeps?")
