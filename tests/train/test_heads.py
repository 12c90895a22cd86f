"""Tagging and questions about passages: scores against numbers by hand, and runs from rows to files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deltatune.data.collate import Collator
from deltatune.data.encode import Encoder, encode
from deltatune.data.formats import detect, examples
from deltatune.data.labels import Labels
from deltatune.data.passages import Window
from deltatune.data.read import table_of
from deltatune.data.tagging import TaggedFeatures
from deltatune.errors import ConfigError
from deltatune.evaluate import (
    best_span,
    dataset_loss,
    entities,
    entity_scores,
    read,
    read_spans,
    shown,
    squad_exact_match,
    squad_f1,
    tag_scores,
    tags_of,
)
from deltatune.evaluate.squad import normalised
from deltatune.train import train
from tests.train import toys
from tests.train.test_loop import Recorder

# ------------------------------------------------------------------------------------------------------------- entities


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O", []),
        ("B-x I-x O", [("x", 0, 2)]),
        ("B-x B-x I-x", [("x", 0, 1), ("x", 1, 3)]),
        ("B-x I-y", [("x", 0, 1), ("y", 1, 2)]),  # another kind begins another entity
        ("O I-x I-x", [("x", 1, 3)]),  # as in CoNLL's scorer, an entity may begin with I-
        ("B-x O I-x", [("x", 0, 1), ("x", 2, 3)]),
        ("B-creative-work I-creative-work", [("creative-work", 0, 2)]),
    ],
)
def test_entities_are_those_of_conll(tags, found):
    assert entities(tags.split()) == found


def test_an_entity_counts_when_its_kind_and_both_ends_are_right():
    true = [["B-x", "I-x", "O", "B-y"], ["O", "O"]]
    predicted = [["B-x", "I-x", "O", "B-x"], ["B-y", "O"]]  # one right, one of another kind, one invented
    assert entity_scores(predicted, true) == pytest.approx({"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5})
    shorter = [["B-x", "O", "O", "O"], ["O", "O"]]
    assert entity_scores(shorter, true)["f1"] == 0
    assert entity_scores(true, true) == {"precision": 1, "recall": 1, "f1": 1}
    assert entity_scores([["O"]], [["O"]]) == {"precision": 0, "recall": 0, "f1": 0}


def test_tags_that_mark_no_entities_get_macro_f1():
    assert tag_scores([["N", "V"], ["V"]], [["N", "V"], ["N"]]) == pytest.approx({"accuracy": 2 / 3, "macro_f1": 2 / 3})
    assert set(tag_scores([["B-x"]], [["O"]])) == {"accuracy", "precision", "recall", "f1"}


def test_words_that_the_model_did_not_see_are_outside():
    row = TaggedFeatures([1, 2, 3], [-100, 0, 1], 2, (0, 2))
    assert tags_of(row, [1, 0], 4, ("B-x", "I-x", "O")) == ["I-x", "O", "B-x", "O"]


def test_a_tagged_text_is_shown_by_its_entities():
    assert shown(["the", "Empire", "State"], ["O", "B-place", "I-place"]) == "Empire State [place]"
    assert shown(["a"], ["O"]) == "(no entity)"
    assert shown(["a", "cat"], ["DET", "N"]) == "a/DET cat/N"


# -------------------------------------------------------------------------------------------------------------- answers


def test_answers_are_normalised_as_squad_does():
    assert normalised("  The U.S., an A-bomb\n(theory)!") == "us abomb theory"
    assert normalised("a the an") == ""
    assert normalised("Another theatre") == "another theatre"  # articles are whole words


def test_answers_are_compared_with_the_best_reference():
    outputs = ["the Broncos", "Denver Broncos team", "", "x"]
    references = [["Broncos"], ["Carolina", "Denver Broncos"], ["something"], ["y"]]
    assert squad_exact_match(outputs, references) == 1 / 4
    # 2 shared words of 3 and 2: precision 2/3, recall 1
    assert squad_f1(outputs, references) == pytest.approx((1 + 0.8 + 0 + 0) / 4)
    assert squad_f1(["cat cat"], [["cat dog"]]) == pytest.approx(0.5)  # a word counts as often as both have it


def window(places, row=0):
    return Window([0] * len(places), [-100, -100], 0, row, tuple(places))


def test_the_best_span_is_the_one_that_trying_all_finds():
    generator = torch.Generator().manual_seed(0)
    places = [None, None, *[(3 * i, 3 * i + 2) for i in range(9)], None]
    for longest in (1, 3, 20):
        first, last = torch.randn(2, len(places) + 4, generator=generator).unbind()  # logits of padding follow
        pairs = [(i, j) for i in range(2, 11) for j in range(i, min(11, i + longest))]
        i, j = max(pairs, key=lambda pair: float(first[pair[0]] + last[pair[1]]))
        found = best_span(window(places), (first, last), longest)
        assert found is not None
        assert found[1:] == (places[i][0], places[j][1])
        assert found[0] == pytest.approx(float(first[i] + last[j]))
    assert best_span(window([None, None]), (first, last), 3) is None


def test_the_answer_is_the_best_of_all_windows():
    rows = [window([None, (0, 3)], 0), window([None, (4, 7)], 0), window([None, (0, 3)], 1)]
    logits = [(torch.tensor([9.0, a]), torch.tensor([9.0, a])) for a in (1.0, 2.0, -5.0)]
    assert read_spans(rows, logits, ["red cat", "dog"], 5) == ["cat", "dog"]


# ----------------------------------------------------------------------------------------------------------------- runs

ROWS = {"token_classification": toys.tagged, "question_answering": toys.passages}
SCORES = {
    "token_classification": {"loss", "accuracy", "precision", "recall", "f1"},
    "question_answering": {"loss", "exact_match", "f1"},
}


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory) -> Path:
    folder = toys.bert(tmp_path_factory.mktemp("bert"), dropout=0.0)
    toys.pieces().save_pretrained(folder)
    return folder


def options(folder, **changes):
    return {"model_name_or_path": str(folder), "train_file": None, "max_length": 24, "max_target_length": 4, **changes}


@pytest.mark.parametrize("task", list(ROWS))
def test_a_run_learns_scores_and_shows(task, settings, encoder_folder):
    steps = {"method": "full", "max_steps": 60, "learning_rate": 1e-2, "num_samples": 2, "eval_before": True}
    made = ROWS[task](48)
    result = train(settings(task, **options(encoder_folder, **steps)), train_rows=made, eval_rows=made[:16])
    before, after = (result.metrics[when]["eval"] for when in ("before", "after"))
    assert set(before) == set(after) == SCORES[task]
    assert after["f1"] > max(0.5, before["f1"])
    assert after["loss"] < before["loss"]
    assert json.loads((result.output_dir / "metrics.json").read_text())["after"]["eval"] == after
    assert len(result.samples) == 2
    first = result.samples[0]
    assert first.before and first.after
    if task == "question_answering":
        assert first.input == f"{made[0]['question']}\n{made[0]['context']}"
        assert first.references == (made[0]["answers"][0]["text"],)
    else:
        assert first.input == " ".join(made[0]["tokens"])
        assert first.references == (shown(made[0]["tokens"], made[0]["tags"]),)


@pytest.mark.parametrize("method", ["prefix_tuning", "lora"])
@pytest.mark.parametrize("task", list(ROWS))
def test_adapters_train_the_head_and_are_loaded_with_it(task, method, settings, encoder_folder, tmp_path):
    from deltatune.generate import Decoding, answers, load_ready
    from deltatune.generate.load import write_labels

    made = ROWS[task](16)
    result = train(settings(task, **options(encoder_folder, method=method, max_steps=3)), train_rows=made)
    head = "qa_outputs" if task == "question_answering" else "classifier"
    trained = {name for name, parameter in result.model.named_parameters() if parameter.requires_grad}
    assert any(head in name for name in trained)
    write_labels(result)
    texts = [f"{r['question']}\n{r['context']}" if "context" in r else " ".join(r["tokens"]) for r in made[:5]]
    ready = load_ready(str(result.output_dir))
    assert ready.task == task
    told = [answer.text for answer in answers(ready, texts, Decoding(batch_size=2))]
    assert told == read(result.model, ready.encoder, texts)
    assert all(told)


def test_the_loss_of_spans_is_the_models_own_where_nothing_is_padded(encoder_folder):
    from transformers import AutoModelForQuestionAnswering

    torch.manual_seed(0)
    model = AutoModelForQuestionAnswering.from_pretrained(encoder_folder).eval()
    table = table_of(toys.passages(6))
    rows, _ = encode(
        examples(table, detect(table, "question_answering")),
        Encoder(toys.pieces(), "question_answering", 24, 4), "rows", None,
    )  # fmt: skip
    collate, device = Collator(0, "question_answering"), torch.device("cpu")
    one = [dataset_loss(model, [collate([row])], "question_answering", device) for row in rows]
    own = [float(model(**collate([row])).loss.detach()) for row in rows]
    assert [loss.mean for loss in one] == pytest.approx(own, rel=1e-5)
    together = dataset_loss(model, [collate(rows)], "question_answering", device)
    assert together.mean == pytest.approx(sum(own) / 6, rel=1e-5)
    assert together.targets == 6


def test_the_loss_of_tags_does_not_depend_on_the_batch(encoder_folder):
    from transformers import AutoModelForTokenClassification

    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_pretrained(encoder_folder, num_labels=2).eval()
    labels = Labels(("B-animal", "O"), ("B-animal", "O"))
    table = table_of([*toys.tagged(4), {"tokens": ["cat"], "tags": ["B-animal"]}])
    rows, _ = encode(
        examples(table, detect(table, "token_classification")),
        Encoder(toys.pieces(), "token_classification", 24, 4, labels=labels), "rows", None,
    )  # fmt: skip
    collate, device = Collator(0, "token_classification"), torch.device("cpu")
    together = dataset_loss(model, [collate(rows)], "token_classification", device)
    alone = dataset_loss(model, [collate([row]) for row in rows], "token_classification", device)
    assert together.mean == pytest.approx(alone.mean, rel=1e-5)
    assert together.targets == alone.targets == 21
    assert together.predicted == alone.predicted
    assert [len(row) for row in together.predicted] == [5, 5, 5, 5, 1]


def test_answers_that_fit_into_no_window_are_left_out_and_told(settings, encoder_folder):
    class Notices(Recorder):
        def on_notice(self, text):
            self.events.append(text)

    told = Notices()
    long = toys.passages(1)[0]
    long["answers"] = [{"text": long["context"], "start": 0}]
    made = [*toys.passages(7), long]
    result = train(
        settings("question_answering", **options(encoder_folder, max_length=10, max_steps=1)),
        train_rows=made, eval_rows=made, callbacks=[told],
    )  # fmt: skip
    assert result.metrics["train_rows"] == 7
    assert any("1 of 8 rows are left out" in event for event in told.events)
    assert 0 <= result.metrics["after"]["eval"]["f1"] <= 1


def test_the_embedded_model_has_no_such_head(settings):
    with pytest.raises(ConfigError, match="text-to-text model"):
        train(settings("token_classification", model_name_or_path="demo", train_file=None), train_rows=toys.tagged(4))
