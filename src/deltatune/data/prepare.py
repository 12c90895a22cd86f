"""Tables to a corpus: columns found, rows checked, tokens made. All of it before the model is loaded or trained."""

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

from deltatune.data.collate import Collator
from deltatune.data.encode import Encoder, Lengths, check_tokenizer, encode
from deltatune.data.example import Columns, Example
from deltatune.data.features import Features
from deltatune.data.formats import detect, examples
from deltatune.data.labels import Labels, collect_labels, keys_of
from deltatune.data.read import Table
from deltatune.errors import DataError


@dataclass(frozen=True)
class Part:
    """The checked rows of one table, and their tokens once `Corpus.encode` has run."""

    source: str
    digest: str
    examples: list[Example]
    features: list[Features] = field(default_factory=list)
    lengths: Lengths | None = None


@dataclass(frozen=True)
class Corpus:
    """What a run reads: training rows, rows to evaluate on, rows to test on at the end."""

    task: str
    columns: Columns
    train: Part
    eval: Part | None = None
    test: Part | None = None
    labels: Labels | None = None
    encoder: Encoder | None = None
    collator: Collator | None = None

    @property
    def digest(self) -> str:
        """Identifies the training rows; the rows to evaluate on do not change what is learnt."""
        named = f"{self.train.digest} {self.columns}"
        return hashlib.sha256(named.encode()).hexdigest()

    def without_task_ids(self) -> "Corpus":
        """The same rows for a model that knows of no tasks, such as the base."""
        return self if self.collator is None else replace(self, collator=replace(self.collator, task_ids=False))

    def encode(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        max_target_length: int,
        separator: str = "\n",
        answer_only: bool = True,
        vocabulary: int | None = None,
    ) -> "Corpus":
        """The same corpus with tokens; they live in memory only."""
        check_tokenizer(tokenizer, self.task)
        encoder = Encoder(tokenizer, self.task, max_length, max_target_length, separator, answer_only, self.labels)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        collator = Collator(0 if pad is None else pad, self.task)

        def tokens(part: Part | None) -> Part | None:
            if part is None:
                return None
            features, lengths = encode(part.examples, encoder, part.source, vocabulary, part is self.train)
            return Part(part.source, part.digest, part.examples, features, lengths)

        train = tokens(self.train)
        assert train is not None
        return Corpus(
            self.task, self.columns, train, tokens(self.eval), tokens(self.test), self.labels, encoder, collator
        )


def prepare(
    train: Table,
    evaluation: Table | None,
    test: Table | None,
    task: str,
    *,
    input_column: str | None = None,
    target_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    task_column: str | None = None,
) -> Corpus:
    """Check every row of every table; the training file decides which columns are read."""
    columns = detect(train, task, input_column, target_column, text_column, label_column)
    columns = replace(columns, task_id=task_column)
    if task == "seq2seq" and columns.form != "pairs":
        raise DataError(
            f"{train.source}: task seq2seq needs an input and a target, the file has text only; use task: causal",
            path=train.source,
            field="task",
            found="seq2seq",
        )
    rows = examples(train, columns)
    labels = collect_labels(train, columns, rows) if columns.form in ("labelled", "tagged") else None

    def part(table: Table | None) -> Part | None:
        if table is None:
            return None
        checked = rows if table is train else examples(table, columns)
        for example in checked if labels else ():
            for key in keys_of(example):
                labels.number(key, example.line, table.source)  # pyright: ignore[reportOptionalMemberAccess]
        return Part(table.source, table.digest, checked)

    made = part(train)
    assert made is not None
    return Corpus(task, columns, made, part(evaluation), part(test), labels)
