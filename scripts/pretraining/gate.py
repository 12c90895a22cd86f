"""The gate: a base that does not read its input is no base for a prefix. Measured on held-out names."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from . import copying, probe, records
from .domains import PLACE_WORDS
from .names import is_held_out

Pair = tuple[str, str]
WORD = re.compile(r"\b[A-Z][a-z]{2,}\b")
SMALLEST_GAP, SMALLEST_SHARE = 0.5, 0.8


def unseen_names(source: str) -> list[str]:
    """The words of an input that the held-out side of the name generator made."""
    found = {word for word in WORD.findall(source) if is_held_out(word.lower())}
    return sorted(found - set(PLACE_WORDS))


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, sources: Sequence[str], size: int = 32) -> list[str]:
    texts: list[str] = []
    for start in range(0, len(sources), size):
        batch = tokenizer(list(sources[start : start + size]), return_tensors="pt", padding=True)
        made = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=96, do_sample=False
        )
        texts += tokenizer.batch_decode(made, skip_special_tokens=True)
    return texts


def copied(sources: Sequence[str], outputs: Sequence[str]) -> dict[str, float]:
    """Share of names that stand in their output as whole words, and of outputs that hold all their names."""
    rows = [(unseen_names(source), set(WORD.findall(output))) for source, output in zip(sources, outputs, strict=True)]
    rows = [(names, words) for names, words in rows if names]
    hits = [name in words for names, words in rows for name in names]
    whole = [all(name in words for name in names) for names, words in rows]
    return {"names": sum(hits) / len(hits), "outputs": sum(whole) / len(whole)}


def measure(model: nn.Module, tokenizer: Any, count: int = 200) -> dict[str, Any]:
    """The figures of the gate and whether it is passed."""
    model.eval()
    described = probe.held_out(records.described, count, "gate records")
    copies = probe.held_out(copying.copied_name, count, "gate copies")
    true, swapped = probe.losses(model, tokenizer.backend_tokenizer, described)
    made = greedy(model, tokenizer, [source for source, _ in described])
    said = greedy(model, tokenizer, [source for source, _ in copies])
    in_records = copied([source for source, _ in described], made)
    in_copies = copied([source for source, _ in copies], said)
    shown = random.Random(0).sample(range(count), 6)
    return {
        "pairs": count,
        "loss": true,
        "loss_swapped": swapped,
        "gap": swapped - true,
        "records_names_copied": in_records["names"],
        "records_outputs_with_all_names": in_records["outputs"],
        "copies_names_copied": in_copies["names"],
        "copies_exact": sum(text == target for text, (_, target) in zip(said, copies, strict=True)) / count,
        "passed": swapped - true >= SMALLEST_GAP and in_records["names"] >= SMALLEST_SHARE,
        "examples": [{"input": described[i][0], "target": described[i][1], "output": made[i]} for i in shown],
    }
