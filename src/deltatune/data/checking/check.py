"""`check`: the rows that training would read, through the same code, and what is worth knowing about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from deltatune.data.chat import prompt_ids
from deltatune.data.checking.duplicates import leak, repetitions
from deltatune.data.checking.pieces import pieces
from deltatune.data.checking.report import Leak, PartReport, Report, RowFault, Sample
from deltatune.data.checking.spread import Spread
from deltatune.data.checking.warn import warnings
from deltatune.data.conversation import Conversation
from deltatune.data.encode import Encoder
from deltatune.data.example import TEXT_TASKS, Example
from deltatune.data.features import IGNORE
from deltatune.data.labels import keys_of
from deltatune.data.prepare import Corpus, Part
from deltatune.errors import DataError
from deltatune.report.words import plural
from deltatune.train.base import Base, load_words
from deltatune.train.corpus import encode_corpus, load_corpus
from deltatune.train.detect import detected
from deltatune.train.settings import TrainSettings

Rows = Iterable[dict[str, Any]]


def check(
    data: str | Sequence[str] | Rows | None = None,
    *,
    settings: TrainSettings | None = None,
    tokenizer: Any = None,
    eval_rows: Rows | None = None,
    samples: int = 3,
    **values: Any,
) -> Report:
    """Read, check and tokenise the rows as `train` does, and report on them; no weights are loaded.

    Args:
        data: Files to train on, or rows in memory; or they are named in the settings.
        settings: Those of the run; instead of them, single ones may be given by name (`task="chat"`, `max_length=64`).
        tokenizer: Instead of that of `model_name_or_path`.
        samples: Rows of each part that are shown whole.

    Raises:
        PeftError: No row can be read at all: no file, no known columns, no chat template. Faulty rows are reported.
    """
    rows: Rows | None = None
    if data is not None:
        listed = [data] if isinstance(data, str) else list(data)
        if listed and all(isinstance(each, str) for each in listed):
            values["train_file"] = listed if len(listed) > 1 else listed[0]
        else:
            rows = listed  # type: ignore[assignment]
    if settings is None:
        settings = TrainSettings(**values)
    elif values:
        settings = TrainSettings(**{**settings.model_dump(exclude_unset=True), **values})
    settings = detected(settings, rows)
    faults: list[DataError] = []
    try:
        corpus = load_corpus(settings, rows, eval_rows, faults=faults)
    except DataError as error:
        if faults:  # that no row is left follows from them
            raise _first(faults) from error
        raise
    base = load_words(settings) if tokenizer is None else Base(None, tokenizer, None)  # type: ignore[arg-type]
    corpus = encode_corpus(settings, corpus, base.tokenizer, base.vocabulary, base.positions, faults)
    return _report(settings, corpus, faults, samples)


def _report(settings: TrainSettings, corpus: Corpus, faults: list[DataError], samples: int) -> Report:
    assert corpus.encoder is not None
    named = [("train", corpus.train), ("eval", corpus.eval), ("test", corpus.test)]
    present = [(name, part) for name, part in named if part is not None]
    parts = [_part(name, part, corpus, settings.packing, samples) for name, part in present]
    leaks: list[Leak] = [leak(name, part.examples, corpus.train.examples) for name, part in present[1:]]
    told = [RowFault(fault.path, fault.key, fault.field, str(fault)) for fault in sorted(faults, key=_place)]
    columns = {name: value for name, value in asdict(corpus.columns).items() if value}
    limit = corpus.encoder.max_length
    return Report(settings.task, columns, limit, parts, leaks, told, warnings(settings.task, limit, parts, leaks))


def _place(fault: DataError) -> tuple[str, int]:
    return fault.path or "", int(fault.key) if fault.key and fault.key.isdigit() else 0


def _first(faults: list[DataError]) -> DataError:
    first, more = faults[0], len(faults) - 1
    rest = f" ({plural(more, 'more faulty row')})" if more else ""
    return DataError(f"{first}{rest}", path=first.path, key=first.key, field=first.field, found=first.found)


def _part(name: str, part: Part, corpus: Corpus, packing: bool, samples: int) -> PartReport:
    encoder, lengths = corpus.encoder, part.lengths
    assert encoder is not None and lengths is not None
    duplicates, near, repeated, contradictions = repetitions(part.examples)
    learnt = [row.targets for row in part.features]
    packs = None
    if packing and name == "train" and part.features:
        rows = corpus.packed().train.features
        packs = (len(rows), sum(row.length for row in rows) / (len(rows) * encoder.max_length))
    return PartReport(
        name=name,
        source=part.source,
        rows=len(part.examples),
        used=lengths.rows - lengths.dropped,
        cut=lengths.truncated,
        left_out=lengths.dropped,
        tokens=Spread.of(lengths.whole),
        learnt=Spread.of(learnt),
        duplicates=duplicates,
        near_duplicates=near,
        repeated=repeated,
        contradictions=contradictions,
        labels=_labels(part, corpus),
        special=_special(encoder.tokenizer, part.examples),
        without_end=_without_end(part, encoder),
        unlike_prompts=_unlike_prompts(part, encoder),
        packs=packs,
        samples=[_sample(encoder, example) for example in _spread(part.examples, samples)],
    )


def _labels(part: Part, corpus: Corpus) -> dict[str, int] | None:
    """Rows, or words, of each class; those of the training rows first, by their number."""
    if corpus.labels is None:
        return None
    counts = Counter(key for example in part.examples for key in keys_of(example))
    return {name: counts[key] for key, name in zip(corpus.labels.keys, corpus.labels.names)}


def _special(tokenizer: Any, examples: Sequence[Example]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    marks = set(tokenizer.all_special_tokens)
    for example in examples:
        texts = [example.text, example.target or ""]
        if isinstance(example, Conversation):
            texts = [str(message.get("content", "")) for message in example.messages]
        counts.update(mark for mark in marks if any(mark in text for text in texts))
    return dict(counts.most_common())


def _without_end(part: Part, encoder: Encoder) -> int | None:
    """Rows that do not teach the model to stop."""
    tokenizer = encoder.tokenizer
    if encoder.task not in TEXT_TASKS or tokenizer.eos_token_id is None:
        return None
    ends = {tokenizer.eos_token_id, *(tokenizer.all_special_ids if encoder.task == "chat" else ())}
    whole = [row for row in part.features if row.whole <= len(row.input_ids)]
    last = (next((label for label in reversed(row.labels) if label != IGNORE), None) for row in whole)
    return sum(label not in ends for label in last)


def _unlike_prompts(part: Part, encoder: Encoder) -> int | None:
    """Conversations whose prompt, tokenised alone, is not the beginning of the whole."""
    if encoder.task != "chat":
        return None
    count = 0
    for example in part.examples:
        if isinstance(example, Conversation):
            row, cut = encoder(example)
            prompt = prompt_ids(encoder.tokenizer, example)
            count += not cut and row.input_ids[: len(prompt)] != prompt
    return count


def _sample(encoder: Encoder, example: Example) -> Sample:
    row, cut, found = pieces(encoder, example)
    return Sample(example.source, example.line, row.whole or row.length, cut, found)


def _spread(rows: Sequence[Any], count: int) -> list[Any]:
    return list(rows) if count >= len(rows) else [rows[i * len(rows) // count] for i in range(count)]
