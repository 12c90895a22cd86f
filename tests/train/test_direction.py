"""A causal task needs a model that writes from left to right, and rows to score that it has not learnt."""

from __future__ import annotations

import json

import pytest
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel, LlamaForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as T5

from deltatune.errors import ConfigError, FormatError
from deltatune.train import TrainSettings, train
from deltatune.train.base import load_base
from deltatune.train.direction import check_direction
from deltatune.train.events import Listener
from tests.train import toys

SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


class Heard(Listener):
    def __init__(self):
        self.notices = []

    def on_notice(self, text):
        self.notices.append(text)


def test_a_model_whose_tokens_see_those_after_them_is_refused():
    ahead = BertLMHeadModel(BertConfig(**SMALL)).train()
    ahead.config.architectures = ["BertModel"]
    with pytest.raises(ConfigError, match=r"a folder \(BertLMHeadModel\) is no causal model: its tokens see those"):
        check_direction(ahead, "a folder")
    assert ahead.training
    forwards = BertLMHeadModel(BertConfig(**SMALL, is_decoder=True))
    forwards.config.architectures = ["BertModel"]
    assert check_direction(forwards, "a folder") == ()


def test_files_of_a_causal_class_are_believed_and_not_tried(tmp_path, monkeypatch):
    model = LlamaForCausalLM.from_pretrained(toys.llama(tmp_path / "base"))
    monkeypatch.setattr(model, "forward", None)
    assert check_direction(model, "a folder") == ()


def test_the_decoder_of_an_encoder_decoder_alone_is_told():
    model = T5(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    model.config.architectures = ["T5ForConditionalGeneration"]
    assert "task: seq2seq takes both" in check_direction(model, "a folder")[0]


def test_an_encoder_does_not_get_into_a_causal_run(tmp_path):
    toys._save(BertForMaskedLM(BertConfig(**{**SMALL, "vocab_size": len(toys.tokenizer())})), tmp_path / "base")
    with pytest.raises(ConfigError, match="is no causal model"):
        load_base(TrainSettings(task="causal", model_name_or_path=str(tmp_path / "base")))


def test_a_task_that_the_model_has_no_class_for_is_answered_with_those_it_has(tmp_path, monkeypatch):
    folder = toys.llama(tmp_path / "tiny-llama")
    with pytest.raises(FormatError, match=r"has no class for task seq2seq; it has one for task: causal, chat, class"):
        load_base(TrainSettings(task="seq2seq", model_name_or_path=str(folder)))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError, match="did you mean 'tiny-llama'"):
        load_base(TrainSettings(task="causal", model_name_or_path="tiny-lama"))


def test_inputs_that_are_trained_on_and_scored_are_told(settings, tmp_path):
    rows = toys.pairs(12)
    again = [{**rows[0], "input": rows[0]["input"].upper() + "!"}, rows[1], *toys.pairs(3, seed=5)]
    known = {row["input"] for row in rows}
    fresh = sum(row["input"] not in known for row in again[2:])
    heard, both = Heard(), {}
    for name, part in (("train", rows), ("eval", again)):
        both[f"{name}_file"] = str(toys.write_jsonl(tmp_path / f"{name}.jsonl", part))
    train(settings("causal", **both, max_steps=1), callbacks=[heard])
    told = [text for text in heard.notices if "trained on too" in text]
    assert len(told) == 1 and f"eval.jsonl: {5 - fresh} of 5 inputs are trained on too" in told[0]
    assert json.loads((tmp_path / "out/metrics.json").read_text())["after"]["eval"]
