"""Data that cannot be trained on: a DataError before the first step, which names file, line and field (row 78)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deltatune.errors import ConfigError, DataError, PeftError
from deltatune.train import TrainSettings, train
from tests.data.test_chat import PLAIN, TWO, tokenizer
from tests.train import toys

GOOD = {"input": "red cat", "target": "dog"}
# what is in the file, what the settings say beside it, what the message must name
FAULTS: dict[str, tuple[list[Any], dict[str, Any], list[str]]] = {
    "empty file": ([], {}, ["is empty"]),
    "malformed line": ([GOOD, "{'input'"], {}, ["line 2", "malformed JSON"]),
    "no object": ([GOOD, "[1]"], {}, ["line 2", "list"]),
    "missing field": ([GOOD, {"input": "red", "tarjet": "x"}], {}, ["line 2", "'target'", "did you mean 'tarjet'"]),
    "empty answer": ([GOOD, {"input": "red", "target": "  "}], {}, ["line 2", "'target'", "is empty"]),
    "null": ([GOOD, {"input": None, "target": "x"}], {}, ["line 2", "'input'", "null"]),
    "number for text": ([GOOD, {"input": 3, "target": "x"}], {}, ["line 2", "'input'", "int"]),
    "unknown columns": ([{"q": "a", "a": "b"}], {}, ["['q', 'a']", "input_column"]),
    "misspelt column": ([GOOD], {"input_column": "inputt", "target_column": "target"}, ["'inputt'", "'input'"]),
    "misspelt mapping": ([GOOD], {"column_mapping": {"prompt": "inputt"}}, ["prompt=inputt", "did you mean 'input'"]),
    "no label": ([{"text": "a", "label": 1}, {"text": "b"}], {"task": "classification"}, ["line 2", "'label'"]),
    "one label": ([{"text": "a", "label": 1}], {"task": "classification"}, ["label '1'", "two classes"]),
    "tags": ([{"tokens": ["a"], "tags": []}], {"task": "ner"}, ["line 1", "'tags'"]),
    "no answer": ([{"messages": TWO}, {"messages": TWO[:2]}], {"task": "chat"}, ["line 2", "'messages'"]),
    "unknown role": (
        [{"messages": [{"role": "usr", "content": "a"}]}], {"task": "chat"}, ["line 1", "messages[0].role", "'user'"],
    ),
    "conversation for another task": ([{"messages": TWO}], {"task": "causal"}, ["'messages'", "task: chat"]),
    "weights": ([GOOD], {"data_weights": [1, 2]}, ["data_weights", "2 weights for 1 data files"]),
    "split of nothing": ([GOOD], {"eval_split": 0.9}, ["eval_split=0.9", "1 rows"]),
}  # fmt: skip


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def refusal(settings: TrainSettings, **more: Any) -> PeftError:
    with pytest.raises(PeftError) as caught:
        train(settings, **more)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", FAULTS)
def test_a_file_that_cannot_be_trained_on_is_refused_before_a_model_is_loaded(name, tmp_path):
    rows, changes, named = FAULTS[name]
    path = write(tmp_path / "rows.jsonl", rows)
    values = {"task": "seq2seq", "model_name_or_path": "/no/model/is/needed", **changes}
    error = refusal(TrainSettings(train_file=str(path), output_dir=str(tmp_path / "out"), **values))
    assert isinstance(error, DataError)
    assert str(path) in str(error) or "data_weights" in str(error)
    for word in named:
        assert word in str(error), (word, str(error))
    assert not list((tmp_path / "out").glob("checkpoint*"))


def model_and(words: Any, size: int) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return {"model": LlamaForCausalLM(config), "tokenizer": words}


@pytest.mark.parametrize(
    ("changes", "row", "kind", "named"),
    [
        ({"task": "causal"}, {"input": "red", "target": "on"}, DataError, ["line 2", "16 embeddings", "tokenizer"]),
        ({"task": "chat"}, {"messages": TWO}, ConfigError, ["no chat template", "chatml"]),
        ({"task": "chat", "chat_template": "nowhere.jinja"}, {"messages": TWO}, ConfigError, ["'nowhere.jinja'"]),
        ({"task": "causal", "truncation": "drop", "max_length": 2}, GOOD, DataError, ["no answer fits", "max_length"]),
    ],
)  # fmt: skip
def test_what_only_tokens_can_tell_is_refused_before_the_first_step(changes, row, kind, named, tmp_path):
    first = GOOD if "input" in row else row
    path = write(tmp_path / "rows.jsonl", [first, row])
    given = model_and(toys.tokenizer(), 16 if "tokenizer" in named else 64)
    settings = TrainSettings(train_file=str(path), output_dir=str(tmp_path / "out"), device="cpu", **changes)
    before = {name: value.clone() for name, value in given["model"].state_dict().items()}
    error = refusal(settings, **given)
    assert isinstance(error, kind)
    for word in named:
        assert word in str(error), (word, str(error))
    assert {
        name: bool((value == before[name]).all()) for name, value in given["model"].state_dict().items()
    } == dict.fromkeys(before, True)


def test_answers_that_are_all_cut_away_are_refused_and_some_are_counted(tmp_path):
    long = [{"role": "user", "content": "red " * 40}, TWO[2]]
    told: list[str] = []

    from deltatune.train import Listener

    class Notes(Listener):
        def on_notice(self, text: str) -> None:
            told.append(text)

    words = tokenizer(PLAIN)
    options = {"task": "chat", "max_length": 16, "output_dir": str(tmp_path / "out"), "device": "cpu", "max_steps": 1}
    error = refusal(TrainSettings(**options), train_rows=[{"messages": long}], **model_and(words, 64))
    assert isinstance(error, DataError) and "no answer fits into 16 tokens" in str(error)
    quiet = {"num_samples": 0, "num_scored": 0, "eval_before": False}
    rows = [{"messages": long}, {"messages": TWO[1:3]}]
    result = train(TrainSettings(**options, **quiet), train_rows=rows, callbacks=[Notes()], **model_and(words, 64))
    assert result.metrics["train_rows"] == 1
    assert any("1 of 2 rows are left out, because nothing of their answers is within max_length=16" in t for t in told)
