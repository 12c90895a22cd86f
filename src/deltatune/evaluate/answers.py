"""What a model answers to inputs, in batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltatune.data.collate import Collator


@dataclass(frozen=True)
class Question:
    """An input as text and as tokens, and every answer that is right."""

    text: str
    prompt: list[int]
    references: tuple[str, ...]
    task_id: int | None = None


@torch.no_grad()
def answer(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    causal: bool,
    max_new_tokens: int,
    task_ids: Sequence[int] | None = None,
    max_length: int | None = None,
    num_beams: int = 1,
    batch_size: int = 16,
    device: torch.device | None = None,
    after_batch: Callable[[int], Any] = lambda done: None,
) -> list[str]:
    """Greedy or beam search from each prompt; only what is new is returned.

    Args:
        task_ids: The task of each prompt, for a model whose tasks share a prompt.
        max_length: Tokens of prompt and answer together that a decoder has positions for.
        after_batch: Told how many prompts are done.
    """
    was_training = model.training
    model.eval()
    collator = Collator(tokenizer.pad_token_id or 0, "causal" if causal else "seq2seq")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = collator.inputs([list(prompts[i]) for i in chosen], left=causal)
            if task_ids is not None:
                inputs["task_ids"] = torch.tensor([task_ids[i] for i in chosen])
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            room = max_new_tokens
            if causal and max_length is not None:
                room = max(1, min(room, max_length - inputs["input_ids"].shape[1]))
            made = model.generate(**inputs, max_new_tokens=room, num_beams=num_beams, do_sample=False)  # type: ignore[operator]
            fresh = made[:, inputs["input_ids"].shape[1] :] if causal else made
            for i, text in zip(chosen, tokenizer.batch_decode(fresh, skip_special_tokens=True)):
                texts[i] = text.strip()
            after_batch(min(start + batch_size, len(order)))
    finally:
        model.train(was_training)
    return texts
