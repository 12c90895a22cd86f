"""Inputs to answers, in batches of like length: text, the likeliest class, the entities, or a span of the context."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltatune.data.collate import Collator
from deltatune.data.example import CAUSAL_TASKS, TEXT_TASKS
from deltatune.evaluate import read
from deltatune.generate.decoding import Decoding
from deltatune.generate.load import Ready


@dataclass(frozen=True)
class Answer:
    """`probability` is that of a class; None for text."""

    text: str
    probability: float | None = None


@torch.no_grad()
def answers(ready: Ready, inputs: Sequence[str], decoding: Decoding, base: bool = False) -> list[Answer]:
    """One answer per input, in their order; with `base` those of the model without its adapter."""
    if ready.task not in TEXT_TASKS and ready.task != "classification":
        return _read(ready, inputs, decoding, base)
    prompts = [ready.encoder.prompt(text) for text in inputs]
    collator = Collator(ready.tokenizer.pad_token_id or 0, ready.task)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, Answer] = {}
    torch.manual_seed(decoding.seed)
    with ready.untouched() if base else nullcontext(ready.model) as model:
        device = next(model.parameters()).device
        for start in range(0, len(order), decoding.batch_size):
            chosen = order[start : start + decoding.batch_size]
            batch = collator.inputs([prompts[i] for i in chosen], left=ready.task in CAUSAL_TASKS)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            made = _classes(ready, model, batch) if ready.labels else _texts(ready, model, batch, decoding)
            found.update(zip(chosen, made))
    return [found[i] for i in range(len(prompts))]


def _read(ready: Ready, inputs: Sequence[str], decoding: Decoding, base: bool) -> list[Answer]:
    with ready.untouched() if base else nullcontext(ready.model) as model:
        device = next(model.parameters()).device
        found = read(model, ready.encoder, inputs, batch_size=decoding.batch_size, device=device)
    return [Answer(text) for text in found]


def _texts(ready: Ready, model: Any, batch: dict[str, Tensor], decoding: Decoding) -> list[Answer]:
    made = model.generate(**batch, **decoding.arguments(ready.encoder.answer_length))
    fresh = made[:, batch["input_ids"].shape[1] :] if ready.task in CAUSAL_TASKS else made
    return [Answer(text.strip()) for text in ready.tokenizer.batch_decode(fresh, skip_special_tokens=True)]


def _classes(ready: Ready, model: Any, batch: dict[str, Tensor]) -> list[Answer]:
    assert ready.labels is not None
    best = model(**batch).logits.float().softmax(-1).max(-1)
    return [Answer(ready.labels.names[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist())]
