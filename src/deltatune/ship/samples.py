"""Inputs on which a result is proven: the user's, those that training left beside the adapter, or a few of ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from deltatune.generate.load import Ready

TRAINED = "samples.json"
COUNT = 8
NEUTRAL = (
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France?",
    "Once upon a time there was a little girl who lived near a forest.",
    "def add(a, b):\n    return a + b",
    "In 1969, two people walked on the moon for the first time.",
    "Please write a short note to a friend.",
)


def samples(adapter: str, ready: Ready, given: Sequence[str] = ()) -> list[str]:
    """At most eight texts (all of those that are given), none of which is empty for the tokenizer."""
    texts = list(given) or [*_trained(Path(adapter)), *NEUTRAL][:COUNT]
    return [text for text in texts if ready.encoder.prompt(text)]


def _trained(folder: Path) -> list[str]:
    try:
        held = json.loads((folder / TRAINED).read_text(encoding="utf-8"))
        return [row["input"] for row in held if isinstance(row.get("input"), str) and row["input"]][: COUNT // 2]
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return []
