"""Scores of one model after the other on the rows of a file: loss, and what else the task has."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from deltatune.data.prepare import Corpus
from deltatune.errors import DataError
from deltatune.generate.load import Ready
from deltatune.train.corpus import load_corpus
from deltatune.train.defaults import FULL
from deltatune.train.events import Listener
from deltatune.train.judge import Judge
from deltatune.train.processes import meet
from deltatune.train.settings import TrainSettings


@dataclass(frozen=True)
class FileScores:
    """Called with a model, gives `loss`, and `perplexity` or the scores of the task."""

    judge: Judge
    corpus: Corpus

    @classmethod
    def of(cls, ready: Ready, file: str, batch_size: int = 16) -> FileScores:
        """The rows of a file, encoded as in the training of what is ready.

        Raises:
            DataError: It cannot be read, a row is faulty, or nothing of it is within the limits.
        """
        encoder = ready.encoder
        settings = TrainSettings(
            task=ready.task, method=FULL, train_file=file, per_device_eval_batch_size=batch_size, dtype="float32"
        )
        corpus = load_corpus(settings)
        if ready.labels is not None:
            corpus = replace(corpus, labels=ready.labels)  # the model's, in its order
        corpus = corpus.encode(
            ready.tokenizer,
            max_length=encoder.max_length,
            max_target_length=encoder.max_target_length,
            separator=encoder.separator,
        )
        if not corpus.train.features:
            raise DataError(f"{file} has no row to score within max_length={encoder.max_length}", path=file)
        kind = next(ready.model.parameters()).device.type
        return cls(Judge(settings, corpus, ready.tokenizer, meet(kind), Listener()), corpus)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        return self.judge.loss(model, self.corpus.train)
