"""Examples as token numbers. Labels cover the answer only: -100 stands wherever nothing is to be learnt."""

from dataclasses import dataclass, replace
from typing import Any

from deltatune.data.chat import prompt_ids, render
from deltatune.data.conversation import Conversation
from deltatune.data.example import TEXT_TASKS, Example, Fault
from deltatune.data.features import IGNORE, Features
from deltatune.data.labels import Labels
from deltatune.data.passages import Passage, windows
from deltatune.data.tagging import Tagged
from deltatune.data.tagging import features as tagged_features
from deltatune.errors import ConfigError, DataError

ANSWER = 128  # tokens of an answer where nothing is said of it


def answer_length(limit: int | None) -> int:
    """Tokens that an answer is given: to write it, and of an encoder-decoder to learn it."""
    return ANSWER if limit is None else limit


def within(limit: int | None, most: int) -> int | None:
    """A limit that is not beyond another one; where there is none, a usual answer has to fit."""
    return most if most < answer_length(limit) else limit


@dataclass(frozen=True)
class Lengths:
    """What the limits cut.

    Attributes:
        dropped: Of `rows`, those that are left out, because they are too long or nothing to learn is left of them.
        whole: Tokens of every row before it was cut.
    """

    longest_input: int
    longest_target: int
    truncated: int
    rows: int
    dropped: int = 0
    whole: tuple[int, ...] = ()


@dataclass(frozen=True)
class Encoder:
    """Examples to features for one task and tokenizer.

    Attributes:
        max_length: Tokens of an input, of a causal model of input and answer together.
        max_target_length: Tokens of an answer. None: 128, and for the learnt ones of a causal model what `max_length`
            leaves.
        truncation: What is cut of a row that is too long: 'left' (its beginning), 'right' (its end), or the row is left
            out ('drop'). None: as suits the task, which for pairs of a causal model is the beginning of the input.
        train_on: What of a conversation is learnt: 'assistant', 'last' or 'all'.
    """

    tokenizer: Any
    task: str
    max_length: int
    max_target_length: int | None = None
    separator: str = "\n"
    answer_only: bool = True
    labels: Labels | None = None
    truncation: str | None = None
    train_on: str = "assistant"

    def __call__(self, example: Example, source: str = "data") -> tuple[Features, bool]:
        """The features and whether a limit cut something; without targets where it cut all there was to learn."""
        source = example.source or source
        if isinstance(example, Conversation):
            return self._chatted(example, source)
        if isinstance(example, Tagged):
            made, cut = tagged_features(self, example, source)
            self._check(made.input_ids if made.targets else [], example, source)
            return made, cut
        if self.task == "classification":
            return self._classified(example, source)
        if self.task == "seq2seq":
            return self._translated(example, source)
        return self._continued(example, source)

    def prompt(self, asked: str | Example) -> list[int]:
        """The token numbers that generation starts from: the same as in training, without the answer."""
        if self.task == "chat":
            asked = asked if isinstance(asked, Conversation) else Conversation.of(str(asked))
            try:
                ids = prompt_ids(self.tokenizer, asked)
            except Fault as fault:
                raise _refused(fault, asked, "input") from fault
            return self._with_room(ids)
        text = asked if isinstance(asked, str) else asked.text
        if self.task == "causal":
            ids = self._ids(text + self.separator, special=True, closed=False)
            return self._with_room(ids)
        return self.cut(self._ids(text, special=True))

    @property
    def answer_length(self) -> int:
        """Tokens that an answer is given when it is written."""
        return answer_length(self.max_target_length)

    def _with_room(self, ids: list[int]) -> list[int]:
        """The end of a prompt, so that a usual answer, or half of `max_length`, fits behind it."""
        return ids[-(self.max_length - min(self.answer_length, self.max_length // 2)) :]

    def _classified(self, example: Example, source: str) -> tuple[Features, bool]:
        assert self.labels is not None
        ids = self._ids(example.text, special=True)
        kept = self.cut(ids)
        label = self.labels.number(example.target or "", example.line, source)
        return Features(kept, [label], 1, whole=len(ids)), len(kept) < len(ids)

    def _translated(self, example: Example, source: str) -> tuple[Features, bool]:
        ids, answer = self._ids(example.text, special=True), self._answer(example.target or "")
        kept, wanted = self.cut(ids), answer[: self.answer_length]
        self._check(wanted, example, source)
        cut = len(kept) < len(ids) or len(wanted) < len(answer)
        return Features(kept, wanted, len(wanted), whole=len(ids)), cut

    def _continued(self, example: Example, source: str) -> tuple[Features, bool]:
        if example.target is None:
            ids = [*self._ids(example.text, special=True, closed=False), *self._end()]
            return self._limited(ids, [True] * len(ids), example, source)
        question = self._ids(example.text + self.separator, special=True, closed=False)
        answer = [*self._ids(example.target, special=False), *self._end()]
        if self.truncation in ("right", "drop"):
            learnt = [not self.answer_only] * len(question) + [True] * len(answer)
            return self._limited(question + answer, learnt, example, source)
        wanted = answer[: self._room(len(question))]
        kept = question[-(self.max_length - len(wanted)) :]  # the end of a question is nearest to its answer
        ids, learnt = kept + wanted, [not self.answer_only] * len(kept) + [True] * len(wanted)
        cut = len(ids) < len(question) + len(answer)
        return self._learnt(ids, learnt, example, source, len(question) + len(answer)), cut

    def _room(self, question: int) -> int:
        """Tokens for the answer to a question: where both are long, half of `max_length` each."""
        if self.max_target_length is not None:
            return min(self.max_target_length, self.max_length - 1)
        return self.max_length - min(question, self.max_length // 2)

    def _chatted(self, example: Conversation, source: str) -> tuple[Features, bool]:
        try:
            found = render(self.tokenizer, example, self.train_on if self.answer_only else "all")
        except Fault as fault:
            raise _refused(fault, example, source) from fault
        return self._limited(found.ids, found.learnt, example, source)

    def _limited(self, ids: list[int], learnt: list[bool], example: Example, source: str) -> tuple[Features, bool]:
        """At most `max_length` tokens; the first stays where it only marks a beginning."""
        if len(ids) <= self.max_length or self.truncation == "drop":
            return self._learnt(ids, learnt, example, source, len(ids)), len(ids) > self.max_length
        if self.truncation == "left":
            mark = int(ids[0] == self.tokenizer.bos_token_id)
            chosen = [*range(mark), *range(len(ids) - self.max_length + mark, len(ids))]
        else:
            chosen = [*range(self.max_length)]
        kept, told = [ids[i] for i in chosen], [learnt[i] for i in chosen]
        if not any(told[1:]) and any(learnt[1:]) and (self.truncation or self.task == "chat"):
            return Features(kept, [IGNORE] * len(kept), 0, whole=len(ids)), True
        return self._learnt(kept, told, example, source, len(ids)), True

    def _learnt(self, ids: list[int], learnt: list[bool], example: Example, source: str, whole: int) -> Features:
        # the first token is predicted by nothing, or by a virtual token: never scored, so that methods compare
        labels = [IGNORE, *(token if told else IGNORE for token, told in zip(ids[1:], learnt[1:]))]
        count = sum(learnt[1:])
        self._check(ids if count else [], example, source)
        return Features(ids, labels, count, whole=whole)

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
        if self.truncation == "left":  # with the mark that every input begins with
            mark = int(ids[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id))
            return ids[:mark] + ids[len(ids) - self.max_length + mark :]
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
    examples: list[Example],
    encoder: Encoder,
    source: str,
    vocabulary: int | None,
    training: bool = True,
    faults: list[DataError] | None = None,
) -> tuple[list[Features], Lengths]:
    """All examples, with what was cut; a token the model has no embedding for is refused before the first step.

    Each example gives one row of features, but passages give a row for each window outside of training, and none for
    training where no window holds the answer. A row that is too long gives none where rows are to be dropped, or where
    nothing to learn is left of it. With `faults`, faulty rows are left out too and told there.
    """
    made: list[Features] = []
    whole: list[int] = []
    cut = dropped = 0
    for number, example in enumerate(examples):
        try:
            found, truncated, tokens = _rows_of(example, encoder, example.source or source, number, training)
            _check_vocabulary(found, encoder.task, vocabulary, example, example.source or source)
        except DataError as error:
            if faults is None:
                raise
            faults.append(error)
            continue
        cut += truncated
        dropped += not found
        whole.append(tokens)
        made += found
    if not made and not faults:
        raise DataError(
            f"{source}: no answer fits into {encoder.max_length} tokens beside its question; raise max_length",
            path=source,
            field="max_length",
            found=encoder.max_length,
        )
    longest = (max((len(f.input_ids) for f in made), default=0), max((f.targets for f in made), default=0))
    return made, Lengths(*longest, cut, len(examples), dropped, tuple(whole))


def _rows_of(
    example: Example, encoder: Encoder, source: str, number: int, training: bool
) -> tuple[list[Features], bool, int]:
    """The features that an example gives, whether a limit cut something, and its tokens before that."""
    if isinstance(example, Passage):
        cuts = windows(encoder, example, number)
        truncated = len(cuts) > 1
        context = {place for row in cuts for place in row.places if place is not None}
        whole = len(context) + sum(place is None for place in cuts[0].places)
        found: list[Features] = [*([row for row in cuts if row.targets][:1] if training else cuts)]
    else:
        features, truncated = encoder(example, source)
        left_out = truncated and (encoder.truncation == "drop" or not features.targets)
        found, whole = [] if left_out else [features], features.whole or features.length
    if example.task_id is not None:
        found = [replace(row, task_id=example.task_id) for row in found]
    return found, truncated, whole


def _refused(fault: Fault, example: Example, source: str) -> DataError:
    return DataError(
        f"{source} line {example.line}: {fault.field} {fault.problem}; expected {fault.expected}",
        path=source,
        key=str(example.line),
        field=fault.field,
        expected=fault.expected,
    )


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
