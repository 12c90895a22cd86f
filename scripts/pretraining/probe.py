"""Does the model read its input? Copied names, and the loss when inputs are swapped."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F

from .mixture import collate, encode

Pair = tuple[str, str]


@torch.no_grad()
def exact_share(model: nn.Module, tokenizer: Tokenizer, pairs: Sequence[Pair], size: int = 64) -> float:
    """Share of outputs that greedy decoding gets wholly right: each token is the likeliest after the true ones."""
    right = 0
    for start in range(0, len(pairs), size):
        batch = collate(encode(tokenizer, list(pairs[start : start + size])))
        best = model(**batch).logits.argmax(-1)
        right += int(((best == batch["labels"]) | (batch["labels"] == -100)).all(-1).sum())
    return right / len(pairs)


@torch.no_grad()
def losses(model: nn.Module, tokenizer: Tokenizer, pairs: Sequence[Pair], size: int = 64) -> tuple[float, float]:
    """Loss per token with the true inputs and with the inputs of another pair."""
    rows = encode(tokenizer, list(pairs))
    swapped = [(rows[(index + 1) % len(rows)][0], target) for index, (_, target) in enumerate(rows)]
    found = []
    for variant in (rows, swapped):
        total, count = 0.0, 0
        for start in range(0, len(variant), size):
            batch = collate(variant[start : start + size])
            logits = model(**batch).logits.float()
            total += float(F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum"))
            count += int((batch["labels"] != -100).sum())
        found.append(total / count)
    return found[0], found[1]


def held_out(make, count: int, seed: str) -> list[Pair]:  # noqa: ANN001 - a generator of pairs: (rng, held_out) -> Pair
    rng = random.Random(seed)
    return [make(rng, True) for _ in range(count)]
