"""The pass over data with which some starts of LoRA begin (EVA, CorDA, LoRA-GA)."""

from __future__ import annotations

from typing import Any

from torch import nn

from deltatune.data.example import TEXT_TASKS
from deltatune.data.prepare import Corpus
from deltatune.lora.preparing import NEEDS_DATA, prepare
from deltatune.train.base import autocast
from deltatune.train.settings import TrainSettings

ROWS = 256  # of the training data, the first ones: as many as CorDA's article takes


def begin(settings: TrainSettings, corpus: Corpus, model: Any, config: Any) -> None:
    """Take from the training rows what the start of a config needs; nothing for methods and starts that need none.

    It is the same in every process and after resuming, because the rows are.
    """
    if getattr(config, "init_lora_weights", None) not in NEEDS_DATA:
        return
    collate, size = corpus.collator, settings.per_device_train_batch_size
    assert collate is not None
    rows = corpus.train.features[:ROWS]
    batches = [collate(rows[first : first + size]) for first in range(0, len(rows), size)]
    options = {"use_cache": False} if settings.task in TEXT_TASKS else {}

    def forward(model: nn.Module, batch: dict[str, Any]) -> Any:
        with autocast(settings, next(model.parameters()).device):
            return model(**batch, **options)

    prepare(model, config, batches, forward)
