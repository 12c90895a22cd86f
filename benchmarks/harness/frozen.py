"""The floor of tasks with a head on every token: a linear head on the frozen base's last hidden states, trained alone.

The hidden states are computed once, so dropout of the base takes no part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deltatune.data import prepare, table_of
from deltatune.data.prepare import Corpus, Part
from deltatune.train.scores import row_scores
from harness.data import Row

_made: dict[tuple[Any, ...], list[Tensor]] = {}  # hidden states of a part are the same for every head


@dataclass(frozen=True)
class Frozen:
    """The base's folder, the task, and the budget of the cell."""

    folder: Path
    task: str
    budget: dict[str, Any]
    tell: Callable[[str], Any]


@torch.no_grad()
def states(frozen: Frozen, part: Part, corpus: Corpus) -> list[Tensor]:
    """(tokens, width) for each row of features."""
    from transformers import AutoModel

    key = (str(frozen.folder), frozen.task, frozen.budget["max_length"], part.digest)
    if key in _made:
        return _made[key]
    model = AutoModel.from_pretrained(frozen.folder, dtype=torch.float32).eval()
    assert corpus.collator is not None
    rows, size = part.features, 32
    order = sorted(range(len(rows)), key=lambda i: rows[i].length)
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        batch = corpus.collator([rows[i] for i in chosen])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
        hidden = model(**inputs).last_hidden_state
        found.update({i: row[: rows[i].length].clone() for i, row in zip(chosen, hidden)})
        frozen.tell(f"hidden states {start + len(chosen)}/{len(order)}")
    return _made.setdefault(key, [found[i] for i in range(len(rows))])


def frozen_head(frozen: Frozen, parts: dict[str, Sequence[Row]], rate: float, seed: int) -> dict[str, Any]:
    """Train on `parts["train"]` as many steps as the others, score dev and test."""
    from transformers import AutoTokenizer

    budget, begun = frozen.budget, time.perf_counter()
    train, dev, test = (table_of(parts[name], name) for name in ("train", "dev", "test"))
    corpus = prepare(train, dev, test, frozen.task).encode(
        AutoTokenizer.from_pretrained(frozen.folder),
        max_length=budget["max_length"],
        max_target_length=budget.get("max_target_length", 1),
    )
    hidden, rows = states(frozen, corpus.train, corpus), corpus.train.features
    torch.manual_seed(seed)
    head = nn.Linear(hidden[0].shape[1], len(corpus.labels) if corpus.labels else 2)
    steps, size = budget["max_steps"], budget["per_device_train_batch_size"]
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    queue: list[int] = []
    for step in range(steps):
        if len(queue) < size:
            queue += torch.randperm(len(rows)).tolist()
        chosen, queue = queue[:size], queue[size:]
        loss = sum(_loss(head(hidden[i]), rows[i].labels, frozen.task) for i in chosen)
        (loss / sum(rows[i].targets for i in chosen)).backward()  # type: ignore[union-attr]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        frozen.tell(f"head {step + 1}/{steps}")
    seconds = time.perf_counter() - begun
    return {
        "dev": _scores(frozen, corpus, corpus.eval, head),
        "test": _scores(frozen, corpus, corpus.test, head),
        "trainable_parameters": sum(parameter.numel() for parameter in head.parameters()),
        "steps": steps,
        "examples": steps * size,
        "train_seconds": round(seconds, 3),
    }


def _loss(logits: Tensor, labels: list[int], task: str) -> Tensor:
    """Summed over the targets of one row; of both ends of a span the mean."""
    if task == "question_answering":
        return cross_entropy(logits.T, torch.tensor(labels), reduction="sum") / 2
    return cross_entropy(logits, torch.tensor(labels), reduction="sum")


@torch.no_grad()
def _scores(frozen: Frozen, corpus: Corpus, part: Part | None, head: nn.Linear) -> dict[str, float]:
    assert part is not None and corpus.encoder is not None
    predicted: list[Any] = []
    for row, hidden in zip(part.features, states(frozen, part, corpus)):
        logits = head(hidden)
        if frozen.task == "question_answering":
            predicted.append(tuple(logits.T))
        else:
            seen = torch.tensor(row.labels) >= 0
            predicted.append(logits.argmax(-1)[seen].tolist())
    return row_scores(part, predicted, corpus.encoder)
