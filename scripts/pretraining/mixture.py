"""What one stretch of pretraining is made of, turned into batches of ids."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from . import copying, names, records, text

Pair = tuple[str, str]
Batch = dict[str, Tensor]
SOURCE_LIMIT, TARGET_LIMIT = 128, 96


@dataclass(frozen=True)
class Mixture:
    """Shares of the kinds of task, and how long the puzzles are."""

    puzzles: float
    records: float
    refills: float
    continuations: float
    denoising: float
    longest_puzzle: int = 6


FIRST = Mixture(puzzles=0.9, records=0.0, refills=0.0, continuations=0.05, denoising=0.05, longest_puzzle=3)
SECOND = Mixture(puzzles=0.5, records=0.25, refills=0.1, continuations=0.075, denoising=0.075)
# the last and longest stretch; the copying never stops
MAIN = Mixture(puzzles=0.1, records=0.55, refills=0.15, continuations=0.1, denoising=0.1)


def pair(rng: random.Random, mixture: Mixture, passages: list[str]) -> Pair:
    shares = (mixture.puzzles, mixture.records, mixture.refills, mixture.continuations, mixture.denoising)
    kind = rng.choices(range(5), shares)[0]
    if kind == 0:
        return copying.puzzle(rng, mixture.longest_puzzle)
    if kind == 1:
        return records.pair(rng)
    passage = rng.choice(passages)
    if kind == 2:
        return text.refill(rng, passage, [names.name(rng) for _ in range(rng.randint(1, 4))])
    return text.continuation(rng, passage) if kind == 3 else text.denoising(rng, passage)


def encode(tokenizer: Tokenizer, pairs: list[Pair]) -> list[tuple[list[int], list[int]]]:
    sources = tokenizer.encode_batch([source for source, _ in pairs])
    targets = tokenizer.encode_batch([target for _, target in pairs])
    return [
        (source.ids[:SOURCE_LIMIT], target.ids[:TARGET_LIMIT]) for source, target in zip(sources, targets, strict=True)
    ]


def collate(rows: list[tuple[list[int], list[int]]]) -> Batch:
    width = max(len(source) for source, _ in rows)
    length = max(len(target) for _, target in rows)
    inputs = torch.tensor([source + [0] * (width - len(source)) for source, _ in rows])
    labels = torch.tensor([target + [-100] * (length - len(target)) for _, target in rows])
    return {"input_ids": inputs, "attention_mask": (inputs != 0).long(), "labels": labels}


def random_tokens(rng: random.Random, prompt: list[int], vocabulary: range, most: int) -> tuple[list[int], list[int]]:
    """Copy a string of tokens drawn from the whole vocabulary: every embedding learns to be copied."""
    string = [rng.choice(vocabulary) for _ in range(rng.randint(2, most))] + [1]
    return prompt + string, string


def batches(
    tokenizer: Tokenizer, mixture: Mixture, passages: list[str], seed: str, examples: int, tokens: int
) -> Iterator[Batch]:
    """One shard: `examples` pairs sorted by length into batches of about `tokens` ids, in random order."""
    rng = random.Random(seed)
    rows = encode(tokenizer, [pair(rng, mixture, passages) for _ in range(examples)])
    prompt = tokenizer.encode("copy:", add_special_tokens=False).ids
    vocabulary = range(3, tokenizer.get_vocab_size())
    most = 2 * mixture.longest_puzzle
    extra = int(examples * mixture.puzzles * 0.25)
    rows += [random_tokens(rng, prompt, vocabulary, most) for _ in range(extra)]
    rows.sort(key=lambda row: (-(-len(row[1]) // 6), len(row[0]), rng.random()))
    groups: list[list[tuple[list[int], list[int]]]] = [[]]
    width = length = 0
    for row in rows:
        wider, longer = max(width, len(row[0])), max(length, len(row[1]))
        if groups[-1] and (wider + longer) * (len(groups[-1]) + 1) > tokens:
            groups.append([])
            wider, longer = len(row[0]), len(row[1])
        groups[-1].append(row)
        width, length = wider, longer
    rng.shuffle(groups)
    for group in groups:
        yield collate(group)
