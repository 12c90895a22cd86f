"""What a model answers to inputs, in batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
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
        max_length: Tokens of prompt and answer together that a decoder is given. What a row has left of them is its
            own, whatever rows it shares a batch with.
        after_batch: Told how many prompts are done.
    """
    was_training = model.training
    model.eval()
    collator = Collator(tokenizer.pad_token_id or 0, "causal" if causal else "seq2seq")
    rooms = [_room(len(prompt), max_new_tokens, max_length if causal else None) for prompt in prompts]
    texts, done = [""] * len(prompts), 0
    try:
        for chosen in _batches(rooms, [len(prompt) for prompt in prompts], batch_size):
            inputs = collator.inputs([list(prompts[i]) for i in chosen], left=causal)
            if task_ids is not None:
                inputs["task_ids"] = torch.tensor([task_ids[i] for i in chosen])
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            room = rooms[chosen[0]]
            made = model.generate(**inputs, max_new_tokens=room, num_beams=num_beams, do_sample=False)  # type: ignore[operator]
            fresh = made[:, inputs["input_ids"].shape[1] :] if causal else made
            for i, text in zip(chosen, tokenizer.batch_decode(fresh, skip_special_tokens=True)):
                texts[i] = text.strip()
            done += len(chosen)
            after_batch(done)
    finally:
        model.train(was_training)
    return texts


def _room(prompt: int, wanted: int, max_length: int | None) -> int:
    return wanted if max_length is None else max(1, min(wanted, max_length - prompt))


def _batches(rooms: Sequence[int], lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Rows of like length that have the same room for their answers."""
    order = sorted(range(len(rooms)), key=lambda i: (-rooms[i], lengths[i]))
    for _, found in groupby(order, key=lambda i: rooms[i]):
        alike = list(found)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))
