"""Linear probe: logistic regression on frozen features, the mean of the last hidden states over the real tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltatune.data.collate import Collator
from deltatune.evaluate import accuracy, macro_f1
from harness.data import Row

_made: dict[tuple[Any, ...], tuple[np.ndarray, float]] = {}  # features of a part are the same for every C


@torch.no_grad()
def features(
    folder: Path, texts: Sequence[str], max_length: int, batch_size: int, tell: Callable[[str], Any]
) -> np.ndarray:
    """One row per text, in order; batches of like length."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    collator = Collator(tokenizer.pad_token_id, "classification")
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    made = np.zeros((len(ids), model.config.hidden_size), dtype=np.float32)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collator.inputs([ids[i] for i in chosen])
        real = batch["attention_mask"].unsqueeze(-1)
        hidden = model(**batch).last_hidden_state  # (B, T, width)
        made[chosen] = ((hidden * real).sum(1) / real.sum(1)).numpy()
        tell(f"features {start + len(chosen)}/{len(order)}")
    return made


def probe(
    folder: Path,
    parts: dict[str, Sequence[Row]],
    c: float,
    max_length: int,
    batch_size: int,
    tell: Callable[[str], Any],
) -> dict[str, Any]:
    """Fit on `parts["train"]`, score the others. `c` is scikit-learn's inverse strength of the penalty."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    made, seconds = {}, 0.0
    for name, rows in parts.items():
        texts = [row["text"] for row in rows]
        key = (*texts, max_length)
        if key not in _made:
            begun = time.perf_counter()
            _made[key] = features(folder, texts, max_length, batch_size, tell), time.perf_counter() - begun
        made[name] = _made[key][0]
        seconds += _made[key][1] if name == "train" else 0.0
    labels = {name: [row["label"] for row in rows] for name, rows in parts.items()}
    begun = time.perf_counter()
    head = LogisticRegression(C=c, max_iter=2000)
    model = make_pipeline(StandardScaler(), head)
    model.fit(made["train"], labels["train"])
    seconds += time.perf_counter() - begun
    scores: dict[str, Any] = {}
    for name in parts.keys() - {"train"}:
        predicted = model.predict(made[name]).tolist()
        scores[name] = {"accuracy": accuracy(predicted, labels[name]), "macro_f1": macro_f1(predicted, labels[name])}
    return {
        **scores,
        "trainable_parameters": int(np.size(head.coef_) + np.size(head.intercept_)),
        "steps": None,
        "examples": len(labels["train"]),
        "train_seconds": round(seconds, 3),
    }
