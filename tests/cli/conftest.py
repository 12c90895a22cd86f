"""A tiny T5 with a word tokenizer, data for it, trained adapters, and a way to run commands in this process."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from deltatune.cli.app import app

WORDS = ["red", "green", "blue", "gold", "cat", "dog", "sun", "sea", "lake", "hill"]


@dataclass
class Done:
    """One finished command."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """Lines on stderr."""
        return self.err.splitlines()


@pytest.fixture
def run():
    """Runs `deltatune WORDS...`."""

    def call(*words, stdin=None) -> Done:
        result = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
        return Done(result.exit_code, result.stdout, result.stderr)

    return call


@pytest.fixture
def refused(run):
    """Runs a command that must fail with `code` and one line on stderr; returns the line."""

    def call(code, *words, stdin=None) -> str:
        done = run(*words, stdin=stdin)
        assert done.code == code, (done.code, done.out, done.err)
        assert len(done.lines) == 1, done.err
        assert done.lines[0].startswith("deltatune: ")
        assert "Traceback" not in done.out + done.err
        assert "internal error" not in done.err
        return done.lines[0]

    return call


def tokenizer(names=WORDS):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *names])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def t5(tmp_path_factory) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=16, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chatty(tmp_path_factory):
    """A tiny decoder with a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.data import test_chat as chat

    folder = tmp_path_factory.mktemp("chatty")
    words = chat.tokenizer(chat.PLAIN)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=words.eos_token_id, bos_token_id=words.bos_token_id,
        max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    """24 rows: three words and the same words backwards."""
    random.seed(0)
    made = [random.sample(WORDS, 3) for _ in range(24)]
    file = tmp_path_factory.mktemp("rows") / "train.jsonl"
    file.write_text("".join(json.dumps({"input": " ".join(w), "target": " ".join(w[::-1])}) + "\n" for w in made))
    return file


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> Path:
    random.seed(1)
    made = [(random.choice(["cat", "sun"]), random.sample(WORDS[:4], 2)) for _ in range(24)]
    file = tmp_path_factory.mktemp("labelled") / "train.csv"
    lines = [f"{' '.join([*rest, word])},{'animal' if word == 'cat' else 'sky'}" for word, rest in made]
    file.write_text("\n".join(["text,label", *lines]) + "\n")
    return file


@pytest.fixture(scope="session")
def usual(t5, rows) -> list[str]:
    """Settings of a short run, all but the method and the output."""
    return [
        f"--model={t5}", f"--train_file={rows}", "--eval_split=0.25", "--max_steps=4", "--eval_steps=2",
        "--logging_steps=1", "--max_target_length=6", "--num_threads=1",
    ]  # fmt: skip


def trained(folder: Path, *words: str) -> Path:
    result = CliRunner().invoke(app, ["train", *words, f"--output_dir={folder}"])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="session")
def lora(usual, tmp_path_factory) -> Path:
    """An adapter folder that `train` wrote."""
    return trained(tmp_path_factory.mktemp("runs") / "lora", *usual, "method=lora", "r=2", "--lr", "0.05")


@pytest.fixture(scope="session")
def prefix(usual, tmp_path_factory) -> Path:
    words = [*usual, "method=prefix", "--num-virtual-tokens", "3"]
    return trained(tmp_path_factory.mktemp("runs") / "prefix", *words)


@pytest.fixture(scope="session")
def classifier(bert, labelled, tmp_path_factory) -> Path:
    words = [f"model={bert}", f"train_file={labelled}", "task=classification", "max_steps=3", "num_threads=1"]
    return trained(tmp_path_factory.mktemp("runs") / "classes", *words)
