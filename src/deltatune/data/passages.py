"""Questions with the passage that holds their answer (SQuAD), read in windows of at most `max_length` tokens.

https://arxiv.org/abs/1606.05250

A context that is too long for one window is read in several, which overlap by a third. Training learns from the first
window that holds the whole answer; a row whose answer fits into none is left out and counted. Evaluation reads all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltatune.data.example import Columns, Example, Fault, absent, kind, short, string
from deltatune.data.features import IGNORE, Features
from deltatune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from deltatune.data.encode import Encoder

Range = tuple[int, int]  # characters from the first to before the second


@dataclass(frozen=True)
class Span:
    """A piece of the context, and the character it starts at."""

    text: str
    start: int


@dataclass(frozen=True)
class Passage(Example):
    """`text` is the question, a line break, and the context. The first answer is the one that is learnt."""

    question: str
    context: str
    answers: tuple[Span, ...] = ()

    @classmethod
    def of(cls, text: str) -> Passage:
        question, _, context = text.partition("\n")
        if not question.strip() or not context.strip():
            raise DataError(
                f"the input {short(text)} is no question with a context; write the question, a line break, the context",
                field="input",
                found=text,
                expected="question, line break, context",
            )
        return cls(text, None, 0, question, context)


@dataclass(frozen=True)
class Window(Features):
    """Labels are the first and the last token of the answer, or ignored where the window does not hold it.

    Attributes:
        row: Number of the example.
        places: The characters of the context that each token stands for; None for question and special tokens.
        types: Token types, where the tokenizer has them.
    """

    row: int
    places: tuple[Range | None, ...]
    types: list[int] | None = None


def passage(row: dict[str, Any], columns: Columns, line: int) -> Passage:
    """A row checked: every answer stands in the context, where it says."""
    (first, second), target = columns.inputs, columns.target
    assert target is not None
    question, context = " ".join(string(row, first).split()), string(row, second)
    spans = _spans(row, target)
    for span in spans:
        there = context[span.start : span.start + len(span.text)]
        if there != span.text:
            problem = f"says {short(span.text)} at character {span.start}, where the context has {short(there)}"
            raise Fault(target, problem, "the text and the place of an answer to agree")
    return Passage(f"{question}\n{context}", spans[0].text, line, question, context, tuple(spans))


def windows(encoder: Encoder, example: Passage, row: int = 0) -> list[Window]:
    """All windows of a passage, from its beginning to its end."""
    tokenizer = encoder.tokenizer
    question, room = _shortened(encoder, example.question)
    found = tokenizer(
        question, example.context, truncation="only_second", max_length=encoder.max_length, stride=room // 3,
        return_overflowing_tokens=True, return_offsets_mapping=True, verbose=False,
    )  # fmt: skip
    made = []
    for i, ids in enumerate(found["input_ids"]):
        parts, offsets = found.sequence_ids(i), found["offset_mapping"][i]
        places = tuple(tuple(place) if part == 1 else None for part, place in zip(parts, offsets))
        held = _held(places, example.answers[0]) if example.answers else None
        types = found["token_type_ids"][i] if "token_type_ids" in found else None
        made.append(Window(ids, list(held or (IGNORE, IGNORE)), int(held is not None), row, places, types))
    return made


def _shortened(encoder: Encoder, question: str) -> tuple[str, int]:
    """The question, cut where it would take more than half of the tokens, and the tokens left for the context."""
    room = encoder.max_length - encoder.tokenizer.num_special_tokens_to_add(pair=True)
    found = encoder.tokenizer(question, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    count = len(found["input_ids"])
    if room < 4:
        raise ConfigError(
            f"max_length={encoder.max_length} leaves no room for a question and its context; 384 is usual",
            field="max_length",
            found=encoder.max_length,
        )
    if count > room // 2:
        count = room // 2
        question = question[: found["offset_mapping"][count - 1][1]]
    return question, room - count


def _held(places: tuple[Range | None, ...], answer: Span) -> tuple[int, int] | None:
    """The first and last token of the answer; None where the window does not hold all of it."""
    begin, end = answer.start, answer.start + len(answer.text)
    inside = [(i, place) for i, place in enumerate(places) if place is not None and place[1] > place[0]]
    if not inside or inside[0][1][0] > begin or inside[-1][1][1] < end:
        return None
    touched = [i for i, (start, stop) in inside if stop > begin and start < end]
    return (touched[0], touched[-1]) if touched else None


def _spans(row: dict[str, Any], name: str) -> list[Span]:
    """Answers as a list of {text, start}, as SQuAD's {text, answer_start}, or as two lists of the same length."""
    expected = "answers, each with its text and the character it starts at"
    if name not in row:
        raise Fault(name, absent(name, row), expected)
    value = row[name]
    if isinstance(value, dict):
        starts, texts = value.get("answer_start", value.get("start")), value.get("text")
        if isinstance(starts, list) and isinstance(texts, list) and len(starts) == len(texts):
            value = [{"text": text, "start": start} for text, start in zip(texts, starts)]
        else:
            value = [value]
    if not isinstance(value, list):
        raise Fault(name, f"is {kind(value)}", expected)
    if not value:
        raise Fault(name, "is empty", "an answer that stands in the context")
    made = []
    for answer in value:
        facts = answer if isinstance(answer, dict) else {}
        text, start = facts.get("text"), facts.get("start", facts.get("answer_start"))
        if not isinstance(text, str) or not text.strip() or not isinstance(start, int) or start < 0:
            raise Fault(name, f"holds {short(answer)}", expected)
        made.append(Span(text, start))
    return made
