"""Models and data small enough to train in a test: a word tokenizer, T5, Llama and BERT of some thousand parameters."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

TEXT = "red green blue small large old new cat dog bird fish house tree runs sleeps sings eats in the a on of"
WORDS = TEXT.split()


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS, ":"])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def t5(folder: Path, dropout: float = 0.1) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2,
        dropout_rate=dropout, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return _save(T5ForConditionalGeneration(config), folder)


def llama(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None, max_position_embeddings=64,
    )  # fmt: skip
    return _save(LlamaForCausalLM(config), folder)


def bert(folder: Path, dropout: float = 0.1) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return _save(BertModel(config), folder)


def _save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = draw.sample(WORDS, draw.randint(2, 5))
        rows.append({"input": " ".join(words), "target": " ".join(reversed(words))})
    return rows


def labelled(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [{"text": " ".join(draw.sample(WORDS, 4)), "label": draw.randint(0, 2)} for _ in range(count)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pieces() -> Any:
    """BERT's way of tokenising: words in pieces, [CLS] and [SEP], token types."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[CLS]", "[UNK]", "[SEP]", *WORDS, "##cat", "##dog", "and"]
    raw = Tokenizer(models.WordPiece({word: number for number, word in enumerate(names)}, unk_token="[UNK]"))  # type: ignore[arg-type]
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 1))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def byte_pieces() -> Any:
    """GPT-2's way: the space before a word is part of its token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(["a", "b", "Ġ", "Ġa", "Ġb"])}
    raw = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("Ġ", "b")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def tagged(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Animals are entities."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = draw.sample(["red", "green", "cat", "dog", "tree", "runs", "sings", "old"], 5)
        tags = ["B-animal" if word in ("cat", "dog") else "O" for word in words]
        rows.append({"tokens": words, "tags": tags})
    return rows


def passages(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Which word is the one that is asked for?"""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = draw.sample(WORDS[:12], 6)
        context = " ".join(words)
        rows.append({
            "question": f"the {words[2]}", "context": context,
            "answers": [{"text": words[2], "start": context.index(words[2])}],
        })  # fmt: skip
    return rows
