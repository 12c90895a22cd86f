"""Examples as token numbers. Labels cover the answer only: -100 stands wherever nothing is to be learnt."""

from dataclasses import dataclass, replace
from typing import Any

from deltatune.data.example import TEXT_TASKS, Example
from deltatune.data.features import IGNORE, Features
from deltatune.data.labels import Labels
from deltatune.data.passages import Passage, windows
from deltatune.data.tagging import Tagged
from deltatune.data.tagging import features as tagged_features
from deltatune.errors import ConfigError, DataError


@dataclass(frozen=True)
class Lengths:
    """What the limits cut."""

    longest_input: int
    longest_target: int
    truncated: int
    rows: int
    dropped: int = 0  # of `rows`, because nothing could be learnt from them


@dataclass(frozen=True)
class Encoder:
    """Examples to features for one task and tokenizer."""

    tokenizer: Any
    task: str
    max_length: int
    max_target_length: int
    separator: str = "\n"
    answer_only: bool = True
    labels: Labels | None = None

    def __call__(self, example: Example, source: str = "data") -> tuple[Features, bool]:
        """The features and whether a limit cut something."""
        if isinstance(example, Tagged):
            made, cut = tagged_features(self, example, source)
            self._check(made.input_ids if made.targets else [], example, source)
            return made, cut
        if self.task == "classification":
            return self._classified(example, source)
        if self.task == "seq2seq":
            return self._translated(example, source)
        return self._continued(example, source)

    def prompt(self, text: str) -> list[int]:
        """The token numbers that generation starts from: the same as in training, without the answer."""
        if self.task == "causal":
            ids = self._ids(text + self.separator, special=True, closed=False)
            return ids[-max(1, self.max_length - 1) :]
        return self.cut(self._ids(text, special=True))

    def _classified(self, example: Example, source: str) -> tuple[Features, bool]:
        assert self.labels is not None
        ids = self._ids(example.text, special=True)
        kept = self.cut(ids)
        return Features(kept, [self.labels.number(example.target or "", example.line, source)], 1), len(kept) < len(ids)

    def _translated(self, example: Example, source: str) -> tuple[Features, bool]:
        ids, answer = self._ids(example.text, special=True), self._answer(example.target or "")
        kept, wanted = self.cut(ids), answer[: self.max_target_length]
        self._check(wanted, example, source)
        return Features(kept, wanted, len(wanted)), len(kept) < len(ids) or len(wanted) < len(answer)

    def _continued(self, example: Example, source: str) -> tuple[Features, bool]:
        if example.target is None:
            whole = [*self._ids(example.text, special=True, closed=False), *self._end()]
            ids = whole[: self.max_length]
            labels = [IGNORE, *ids[1:]]
            cut = len(ids) < len(whole)
        else:
            question = self._ids(example.text + self.separator, special=True, closed=False)
            answer = [*self._ids(example.target, special=False), *self._end()]
            wanted = answer[: min(self.max_target_length, self.max_length - 1)]
            kept = question[-(self.max_length - len(wanted)) :]  # the end of a question is nearest to its answer
            ids = kept + wanted
            labels = ([IGNORE] * len(kept) if self.answer_only else [IGNORE, *kept[1:]]) + wanted
            cut = len(kept) < len(question) or len(wanted) < len(answer)
        count = sum(label != IGNORE for label in labels[1:])
        self._check(ids if count else [], example, source)
        # the first token is predicted by nothing, or by a virtual token: never scored, so that methods compare
        return Features(ids, [IGNORE, *labels[1:]], count), cut

    def _ids(self, text: str, special: bool, closed: bool = True) -> list[int]:
        # verbose=False: the limit is ours, and the report tells what it cut
        ids = list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        if not closed and ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()  # a prompt goes on
        return ids

    def cut(self, ids: list[int]) -> list[int]:
        """At most `max_length` tokens, the closing one among them."""
        if len(ids) <= self.max_length:
            return ids
        closing = self.tokenizer.eos_token_id if self.task == "seq2seq" else self.tokenizer.sep_token_id
        if closing is not None and ids[-1] == closing:
            return [*ids[: self.max_length - 1], closing]
        return ids[: self.max_length]

    def _answer(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text_target=text, verbose=False)["input_ids"])
        end = self.tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]

    def _end(self) -> list[int]:
        return [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]

    def _check(self, scored: list[int], example: Example, source: str) -> None:
        if not scored:
            raise DataError(
                f"{source} line {example.line}: nothing is left to learn after tokenisation; "
                "every row needs at least one answer token",
                path=source,
                key=str(example.line),
                field="labels",
                found=0,
                expected="at least one answer token",
            )


def encode(
    examples: list[Example], encoder: Encoder, source: str, vocabulary: int | None, training: bool = True
) -> tuple[list[Features], Lengths]:
    """All examples, with what was cut; a token the model has no embedding for is refused before the first step.

    Each example gives one row of features, but passages give a row for each window outside of training, and none for
    training where no window holds the answer.
    """
    made: list[Features] = []
    cut = dropped = 0
    for number, example in enumerate(examples):
        if isinstance(example, Passage):
            found: list[Features] = [*windows(encoder, example, number)]
            truncated = len(found) > 1
            found = [row for row in found if row.targets][:1] if training else found
        else:
            features, truncated = encoder(example, source)
            found = [features]
        if example.task_id is not None:
            found = [replace(row, task_id=example.task_id) for row in found]
        cut += truncated
        dropped += not found
        made += found
        _check_vocabulary(found, encoder.task, vocabulary, example, source)
    if not made:
        raise DataError(
            f"{source}: no answer fits into {encoder.max_length} tokens beside its question; raise max_length",
            path=source,
            field="max_length",
            found=encoder.max_length,
        )
    longest_target = max(f.targets for f in made)
    return made, Lengths(max(len(f.input_ids) for f in made), longest_target, cut, len(examples), dropped)


def _check_vocabulary(rows: list[Features], task: str, vocabulary: int | None, example: Example, source: str) -> None:
    if vocabulary is None:
        return
    for row in rows:
        highest = max([*row.input_ids, *(row.labels if task in TEXT_TASKS else ())])
        if highest >= vocabulary:
            raise DataError(
                f"{source} line {example.line}: token {highest} but the model has only {vocabulary} embeddings; "
                "the tokenizer belongs to another model",
                path=source,
                key=str(example.line),
                field="tokenizer",
                found=highest,
                expected=f"below {vocabulary}",
            )


def check_tokenizer(tokenizer: Any, task: str) -> None:
    """Tags and spans are found by where tokens stand in the text, which only fast tokenizers tell."""
    if task in ("token_classification", "question_answering") and not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"task {task} needs a fast tokenizer, {type(tokenizer).__name__} is none; save it with a tokenizer.json",
            field="task",
            found=type(tokenizer).__name__,
        )
