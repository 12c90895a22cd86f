"""Words with a tag each, such as BIO tags of named entities: a word's tag is learnt and read at its first token."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from deltatune.data.example import Columns, Example, Fault, absent, kind, name_of_class
from deltatune.data.features import IGNORE, Features

if TYPE_CHECKING:
    from deltatune.data.encode import Encoder

WORDS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "labels", "pos_tags", "chunk_tags")


@dataclass(frozen=True)
class Tagged(Example):
    """`text` is the words with spaces between them; without `tags` it is a text to be tagged."""

    words: tuple[str, ...]
    tags: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str) -> Tagged:
        return cls(text, None, 0, tuple(text.split()))


@dataclass(frozen=True)
class TaggedFeatures(Features):
    """`words[i]` is the number of the word that label i belongs to; words without a token of their own have none."""

    words: tuple[int, ...]


def tagged(row: dict[str, Any], columns: Columns, line: int) -> Tagged:
    """A row checked: as many tags as words, and none of them empty."""
    (field,), target = columns.inputs, columns.target
    assert target is not None
    words = _list(row, field, "a list of words")
    for place, word in enumerate(words, 1):
        if not isinstance(word, str) or not word.strip():
            raise Fault(field, f"has {kind(word)} as word {place}", "words that are text and not empty")
    names = [name_of_class(tag) for tag in _list(row, target, "a list with a tag for each word")]
    for place, name in enumerate(names, 1):
        if not name:
            raise Fault(target, f"has {kind(row[target][place - 1])} as tag {place}", "names or whole numbers")
    if len(names) != len(words):
        raise Fault(target, f"has {len(names)} tags for {len(words)} words", f"a tag for each word of {field!r}")
    return Tagged(" ".join(words), None, line, tuple(words), tuple(name for name in names if name))


def features(encoder: Encoder, example: Tagged, source: str) -> tuple[TaggedFeatures, bool]:
    """Labels at first tokens, and whether the limit cut something."""
    ids, begun = word_tokens(encoder.tokenizer, example.words)
    kept = encoder.cut(ids)
    begun = begun[: len(kept)] if kept == ids[: len(kept)] else [*begun[: len(kept) - 1], None]
    numbers = [0] * len(example.words)  # a text to be tagged: any label marks where to read
    if example.tags:
        assert encoder.labels is not None
        numbers = [encoder.labels.number(tag, example.line, source) for tag in example.tags]
    labels = [IGNORE if word is None else numbers[word] for word in begun]
    words = tuple(word for word in begun if word is not None)
    return TaggedFeatures(kept, labels, len(words), words), len(kept) < len(ids)


def word_tokens(tokenizer: Any, words: Sequence[str]) -> tuple[list[int], list[int | None]]:
    """Token numbers of the words joined by spaces, and for each the word that begins there, if one does.

    A token belongs to the word of its last character: some tokenizers count the space before a word as part of it.
    """
    found = tokenizer(" ".join(words), return_offsets_mapping=True, verbose=False)
    ends = list(accumulate(len(word) + 1 for word in words))  # each with the space behind it
    begun: list[int | None] = []
    last = -1
    for start, end in found["offset_mapping"]:
        word = bisect_right(ends, end - 1) if end > start else last  # special tokens are nowhere
        begun.append(word if word > last else None)
        last = max(last, word)
    return list(found["input_ids"]), begun


def _list(row: dict[str, Any], name: str, expected: str) -> list[Any]:
    if name not in row:
        raise Fault(name, absent(name, row), expected)
    value = row[name]
    if not isinstance(value, list):
        raise Fault(name, f"is {kind(value)}", expected)
    if not value:
        raise Fault(name, "is empty", expected)
    return value
