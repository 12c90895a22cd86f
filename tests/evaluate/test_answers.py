"""Answers belong to their inputs, whatever else is in the batch."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltatune.evaluate.answers import answer


class Numbers:
    """Tokens as their numbers."""

    pad_token_id = 0

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(str(int(token)) for token in row if token) for row in rows]


def small() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, eos_token_id=None, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def test_an_answer_is_the_same_alone_and_beside_a_long_input():
    """The room that is left for an answer was once that of the longest input of the batch."""
    model, told = small(), []
    prompts = [[5, 6, 7], [8, 9], [3] * 31, [4] * 28]
    ask = {"causal": True, "max_new_tokens": 8, "max_length": 32}
    together = answer(model, Numbers(), prompts, **ask, after_batch=told.append)
    assert together == [answer(model, Numbers(), [prompt], **ask)[0] for prompt in prompts]
    assert [len(text.split()) for text in together] == [8, 8, 1, 4]
    assert told == [2, 3, 4]
    assert answer(model, Numbers(), prompts[:2], **ask, batch_size=1) == together[:2]
