"""What `check` finds: counts that can be told by hand, duplicates, leaks, special tokens, faults by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deltatune.data import check
from deltatune.data.checking.duplicates import normal
from deltatune.data.checking.spread import Spread
from deltatune.errors import ConfigError, DataError
from deltatune.train import TrainSettings
from deltatune.train.corpus import encode_corpus, load_corpus
from tests.data.test_chat import PLAIN, TWO, tokenizer
from tests.train import toys


def rows_in(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def pair(text: str, target: str) -> dict[str, str]:
    return {"input": text, "target": target}


def test_counts_and_lengths_are_those_that_training_uses(tmp_path, words):
    made = [pair(" ".join(["red"] * n), "cat") for n in range(1, 21)]
    path = rows_in(tmp_path / "r.jsonl", made)
    settings = TrainSettings(train_file=path, task="causal", max_length=12, truncation="drop", packing=True)
    report = check(settings=settings, tokenizer=words)
    corpus = encode_corpus(settings, load_corpus(settings), words, None, None)
    (train,) = report.parts
    lengths = corpus.train.lengths
    assert lengths is not None
    assert (train.rows, train.used, train.left_out, train.cut) == (20, len(corpus.train.features), lengths.dropped, 10)
    assert train.tokens.most == 22 and train.tokens.total == sum(range(3, 23))  # and the answer with its end
    assert train.learnt.total == sum(row.targets for row in corpus.train.features) == 20
    packs = corpus.packed().train.features
    assert train.packs is not None and train.packs[0] == len(packs)
    assert train.packs[1] == pytest.approx(sum(pack.length for pack in packs) / (12 * len(packs)))
    assert any("left out by max_length=12" in warning for warning in report.warnings)


def test_samples_show_what_is_learnt(words):
    report = check([pair("red cat", "blue dog")], tokenizer=words, task="causal", separator=" :", samples=1)
    (sample,) = report.parts[0].samples
    assert sample.pieces == [("red cat :", False), (" blue dog </s>", True)]
    chat = check([{"messages": TWO}], tokenizer=tokenizer(PLAIN), task="chat", samples=1)
    learnt = [text.strip() for text, told in chat.parts[0].samples[0].pieces if told]
    assert learnt == ["blue dog [end]", "small bird sings [end]"]


def test_duplicates_are_found_letter_by_letter_and_nearly(words):
    made = [pair("red cat", "dog"), pair("blue", "dog"), pair("red cat", "dog"), pair("Red, cat!", "DOG"),
            pair("blue", "cat")]  # fmt: skip
    (train,) = check(made, tokenizer=words, task="causal").parts
    assert (train.duplicates, train.near_duplicates, train.contradictions) == (1, 1, 1)
    assert train.repeated == [[1, 3]]
    assert normal("  Red,  CAT!") == normal("red cat") != normal("redcat")
    assert normal("...") != normal("!?")  # nothing else to tell them apart by


def test_rows_that_are_also_trained_on_are_told(words):
    made = [pair("red cat", "dog"), pair("blue", "dog"), pair("green", "tree")]
    report = check(made, eval_rows=[pair("Blue.", "dog"), pair("green", "fish"), pair("old", "new")], tokenizer=words,
                   task="causal")  # fmt: skip
    (leak,) = report.leaks
    assert (leak.part, leak.same_inputs, leak.same_answers) == ("eval", 2, 1)
    assert leak.lines == [(1, 2), (2, 3)]
    assert any("line 1 (train line 2)" in warning for warning in report.warnings)


def test_labels_are_counted_and_uneven_ones_told(words):
    made = [{"text": f"red {i}", "label": "a"} for i in range(20)] + [{"text": "cat", "label": "b"}]
    report = check([*made, {"text": "cat", "label": "a"}], tokenizer=words, task="classification")
    assert report.parts[0].labels == {"a": 21, "b": 1}
    assert any("label 'a' has 21 rows, 'b' only 1" in warning for warning in report.warnings)
    assert any("1 inputs have more than one label" in warning for warning in report.warnings)


def test_special_tokens_in_the_text_are_told(words):
    made = [pair("red </s> cat", "dog"), pair("blue", "dog </s>"), pair("green", "tree")]
    report = check(made, tokenizer=words, task="causal")
    assert report.parts[0].special == {"</s>": 2}
    assert any("</s> in 2 rows" in warning for warning in report.warnings)


def test_all_faulty_rows_are_told_and_the_rest_is_checked(tmp_path, words):
    path = rows_in(
        tmp_path / "r.jsonl",
        [pair("red", "cat"), "{broken", {"input": "red", "targt": "cat"}, pair("red", " "), "[1]", pair("old", "new")],
    )
    report = check(path, tokenizer=words, task="causal")
    assert [(fault.line, fault.field) for fault in report.faults] == [
        ("2", None), ("3", "target"), ("4", "target"), ("5", None),
    ]  # fmt: skip
    assert all(fault.path == path and path in fault.message for fault in report.faults)
    assert "did you mean 'targt'?" in report.faults[1].message
    assert report.parts[0].rows == 2
    with pytest.raises(DataError, match="line 2: malformed JSON"):
        load_corpus(TrainSettings(train_file=path, task="causal"))


def test_a_file_of_faulty_rows_only_is_refused_with_the_first(tmp_path, words):
    path = rows_in(tmp_path / "r.jsonl", ["{broken", "[1]"])
    with pytest.raises(DataError, match=r"r\.jsonl line 1: malformed JSON.* \(1 more faulty row\)"):
        check(path, tokenizer=words, task="causal")


def test_a_conversation_the_template_refuses_is_a_fault_of_its_row():
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
    report = check([{"messages": TWO}, {"messages": TWO[1:]}], tokenizer=tokenizer(strict), task="chat")
    assert [fault.line for fault in report.faults] == ["1"]
    assert "no system" in report.faults[0].message
    assert report.parts[0].rows == 1


def test_a_template_that_joins_prompt_and_answer_is_told():
    words = tokenizer(PLAIN)
    assert check([{"messages": TWO}], tokenizer=words, task="chat").parts[0].unlike_prompts == 0
    other = PLAIN.replace("[assistant] {% endif %}", "[assistant] [user] {% endif %}")  # asks otherwise than it writes
    marked = other.replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}"
        "{{ m['content'] }}{% endif %}",
    )
    assert check([{"messages": TWO}], tokenizer=tokenizer(marked), task="chat").parts[0].unlike_prompts == 1


def test_the_report_is_json_and_its_histogram_counts_every_row(words):
    report = check(toys.pairs(30), tokenizer=words, task="causal", eval_split=0.2)
    told = json.loads(json.dumps(report.as_json()))
    assert [part["name"] for part in told["parts"]] == ["train", "eval"]
    for part in told["parts"]:
        assert sum(count for *_, count in part["tokens"]["bins"]) == part["rows"]


def test_percentiles_and_bins_are_those_of_the_numbers():
    spread = Spread.of([*range(1, 100), 5000])
    assert (spread.least, spread.p50, spread.p90, spread.p99, spread.most) == (1, 51, 91, 5000, 5000)
    assert sum(count for *_, count in spread.bins) == 100
    assert spread.bins[0][0] == 1 and spread.bins[-1][1] >= 5000
    assert Spread.of([]).bins == []
    assert Spread.of([7, 7]).bins == [(7, 7, 2)]


def test_the_task_is_found_by_the_data(tmp_path, words):
    for row, task in [
        ({"tokens": ["red"], "tags": ["O"]}, "token_classification"),
        ({"text": "red", "label": 1}, "classification"),
        (pair("red", "cat"), "seq2seq"),
    ]:
        rows = [row, {**row, "label": 0, "tags": ["B-x"]}]
        assert check(rows if task != "seq2seq" else [row], tokenizer=words).task == task
    assert check([{"messages": TWO}], tokenizer=tokenizer(PLAIN)).task == "chat"


def test_what_cannot_be_read_at_all_is_refused(words):
    with pytest.raises(ConfigError, match="has no chat template"):
        check([{"messages": TWO}], tokenizer=tokenizer(None), task="chat")
    with pytest.raises(DataError, match="are no known format"):
        check([{"a": 1}], tokenizer=words, task="causal")
    with pytest.raises(DataError, match="does not exist"):
        check("/no/such/file.jsonl", tokenizer=words)
