"""Tables to a corpus: columns found, rows checked, tokens made. All of it before the model is loaded or trained."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deltatune.data.collate import Collator
from deltatune.data.encode import Encoder, Lengths, check_tokenizer, encode
from deltatune.data.example import Columns, Example
from deltatune.data.features import Features
from deltatune.data.formats import detect, examples
from deltatune.data.labels import Labels, collect_labels, keys_of, known_labels
from deltatune.data.pack import packed
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

    @property
    def rows(self) -> int:
        """Rows of the data that are used."""
        return sum(row.rows for row in self.features)


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

    def without_task_ids(self) -> Corpus:
        """The same rows for a model that knows of no tasks, such as the base."""
        return self if self.collator is None else replace(self, collator=replace(self.collator, task_ids=False))

    def encode(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        max_target_length: int | None = None,
        separator: str = "\n",
        answer_only: bool = True,
        vocabulary: int | None = None,
        truncation: str | None = None,
        train_on: str = "assistant",
        faults: list[DataError] | None = None,
    ) -> Corpus:
        """The same corpus with tokens; they live in memory only."""
        check_tokenizer(tokenizer, self.task)
        encoder = Encoder(
            tokenizer,
            self.task,
            max_length,
            max_target_length,
            separator,
            answer_only,
            self.labels,
            truncation,
            train_on,
        )
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        collator = Collator(0 if pad is None else pad, self.task)

        def tokens(part: Part | None) -> Part | None:
            if part is None:
                return None
            features, lengths = encode(part.examples, encoder, part.source, vocabulary, part is self.train, faults)
            refused = {(fault.path, fault.key) for fault in faults or ()}
            kept = [e for e in part.examples if (e.source or part.source, str(e.line)) not in refused]
            return replace(part, examples=kept, features=features, lengths=lengths)

        train = tokens(self.train)
        assert train is not None
        return replace(
            self, train=train, eval=tokens(self.eval), test=tokens(self.test), encoder=encoder, collator=collator
        )

    def packed(self, flat: bool = False) -> Corpus:
        """The same corpus with several training rows in each of at most `max_length` tokens."""
        assert self.encoder is not None and self.collator is not None
        train = replace(self.train, features=[*packed(self.train.features, self.encoder.max_length)])
        return replace(self, train=train, collator=replace(self.collator, flat=flat))


def prepare(
    train: Table | Sequence[Table],
    evaluation: Table | Sequence[Table] | None,
    test: Table | Sequence[Table] | None,
    task: str,
    *,
    input_column: str | None = None,
    target_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    task_column: str | None = None,
    classes: Sequence[str] | None = None,
    faults: list[DataError] | None = None,
) -> Corpus:
    """Check every row of every table. Each training table has its own columns; the others are read as the first one
    where they have the same.

    With `faults`, faulty rows are left out and told there, instead of being refused. `classes` are the names of the
    classes that a trained model knows; else the training rows say what there is.
    """
    tables = _listed(train)
    names = (input_column, target_column, text_column, label_column)
    found = [replace(detect(table, task, *names), task_id=task_column) for table in tables]
    for table, columns in zip(tables, found):
        if task == "seq2seq" and columns.form != "pairs":
            raise DataError(
                f"{table.source}: task seq2seq needs an input and a target, the file has text only; use task: causal",
                path=table.source,
                field="task",
                found="seq2seq",
            )
    rows = [examples(table, columns, faults) for table, columns in zip(tables, found)]
    labels = None
    if found[0].form in ("labelled", "tagged"):
        labels = collect_labels(tables, found, rows) if classes is None else known_labels(classes, tables, found, rows)
    made = _part(tables, rows, labels, None)

    def part(given: Table | Sequence[Table] | None) -> Part | None:
        others = _listed(given)
        if not others:
            return None
        read = [
            found[0] if _has(table, found[0]) else replace(detect(table, task, *names), task_id=task_column)
            for table in others
        ]
        checked = [examples(table, columns, faults) for table, columns in zip(others, read)]
        return _part(others, checked, labels, faults)

    return Corpus(task, found[0], made, part(evaluation), part(test), labels)


def _part(
    tables: list[Table], rows: list[list[Example]], labels: Labels | None, faults: list[DataError] | None
) -> Part:
    kept: list[Example] = []
    for example in (example for checked in rows for example in checked):
        try:
            for key in keys_of(example) if labels else ():
                labels.number(key, example.line, example.source)  # pyright: ignore[reportOptionalMemberAccess]
        except DataError as error:
            if faults is None:
                raise
            faults.append(error)
        else:
            kept.append(example)
    digest = tables[0].digest
    if len(tables) > 1:
        digest = hashlib.sha256(" ".join(table.digest for table in tables).encode()).hexdigest()
    source = tables[0].source if len(tables) == 1 else f"{tables[0].source} and {len(tables) - 1} more"
    return Part(source, digest, kept)


def _has(table: Table, columns: Columns) -> bool:
    """Whether a table has the columns that another one is read by."""
    present = {name for row in table.rows[:20] for name in row}
    return {*columns.inputs[:1], *([columns.target] if columns.target else [])} <= present or not present


def _listed(tables: Table | Sequence[Table] | None) -> list[Table]:
    return [] if tables is None else [tables] if isinstance(tables, Table) else list(tables)
