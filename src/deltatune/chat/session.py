"""A conversation with models that take turns on one base: what was said, who speaks next, what they are given to read.

Models that know conversations get all of it, through the chat template. Models that were trained on inputs and answers
get each message alone, as in training: more is what they have never seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from deltatune.chat.stream import stream
from deltatune.data.chat import prompt_ids
from deltatune.data.conversation import Conversation
from deltatune.data.encode import Encoder
from deltatune.data.example import TEXT_TASKS
from deltatune.data.templates import set_template
from deltatune.errors import ConfigError, DataError
from deltatune.generate.decoding import Decoding
from deltatune.generate.load import Ready
from deltatune.generate.several import BASE, Several
from deltatune.scoring.rows import run_settings

PLAIN = "plain"  # the template where a decoder has none of its own


@dataclass(frozen=True)
class Turn:
    """What the user said, who answered, and what."""

    said: str
    speaker: str
    answer: str


@dataclass
class Session:
    """`speaker` is the adapter that answers next, or `base`.

    Raises:
        ConfigError: The models write no text, or a template that is asked for does not exist.
    """

    several: Several
    decoding: Decoding = field(default_factory=Decoding)
    template: str | None = None
    system: str | None = None
    speaker: str = BASE
    turns: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_chat(self.several.task, self.decoding)
        self.several.readies = {name: self._prepared(name, one) for name, one in self.several.readies.items()}
        if self.several.adapters and self.speaker == BASE:
            self.speaker = self.several.adapters[0]

    @property
    def remembers(self) -> bool:
        """Whether the speaker is given what was said before."""
        return self.several.ready(self.speaker).task == "chat"

    def switch(self, name: str) -> None:
        """Raises AdapterNameError."""
        self.several.ready(name)
        self.speaker = name

    def reset(self) -> None:
        self.turns.clear()

    def say(self, text: str) -> Iterator[str]:
        """The speaker's answer in pieces. It is part of the conversation once it is whole, or was interrupted."""
        said: list[str] = []
        try:
            for piece in self._answer(self.speaker, self.turns, text):
                said.append(piece)
                yield piece
        finally:
            if said:
                self.turns.append(Turn(text, self.speaker, "".join(said).strip()))

    def compare(self, text: str | None = None) -> Iterator[tuple[str, Iterator[str]]]:
        """Every model's answer, in pieces, to this message or to the last one again; none is remembered."""
        before = self.turns if text is not None else self.turns[:-1]
        if text is None:
            if not self.turns:
                raise DataError("nothing was said yet that could be compared; give a message with it", field="compare")
            text = self.turns[-1].said
        for name in self.several.readies:
            yield name, self._answer(name, before, text)

    def _answer(self, name: str, turns: Sequence[Turn], text: str) -> Iterator[str]:
        ready = self.several.ready(name)
        ids = torch.tensor([self.prompt(ready, turns, text)], device=next(ready.model.parameters()).device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs |= self.decoding.arguments(ready.encoder.answer_length)
        torch.manual_seed(self.decoding.seed + len(turns))
        generate: Any = ready.model.generate
        return stream(ready.tokenizer, generate, inputs, self.several.using(name))

    def prompt(self, ready: Ready, turns: Sequence[Turn], text: str) -> list[int]:
        """The tokens that the answer starts from. The oldest turns are left out where all do not fit."""
        if ready.task != "chat":
            return ready.encoder.prompt(text)
        room = max(1, ready.encoder.max_length - (self.decoding.max_new_tokens or ready.encoder.answer_length))
        for first in range(len(turns) + 1):
            ids = prompt_ids(ready.tokenizer, self._conversation(turns[first:], text))
            if len(ids) <= room:
                return ids
        return ids[-max(1, ready.encoder.max_length - 1) :]

    def _conversation(self, turns: Sequence[Turn], text: str) -> Conversation:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in turns:
            messages += [{"role": "user", "content": turn.said}, {"role": "assistant", "content": turn.answer}]
        return Conversation(text, None, 0, (*messages, {"role": "user", "content": text}))

    def _prepared(self, name: str, ready: Ready) -> Ready:
        """With a chat template where it is one that converses."""
        if ready.task == "seq2seq":
            if self.template is not None:
                raise ConfigError(
                    f"chat_template={self.template!r}: {name} is an encoder-decoder, which has no use for one",
                    field="chat_template",
                    found=self.template,
                )
            return ready
        paired = ready.task == "causal" and bool(run_settings(self._trained(name)))
        if paired and self.template is None:
            return ready  # trained on inputs and answers by `train`
        wanted = self.template or (None if ready.tokenizer.chat_template else PLAIN)
        set_template(ready.tokenizer, wanted)
        encoder: Encoder = replace(ready.encoder, task="chat")
        return replace(ready, task="chat", encoder=encoder)

    def _trained(self, name: str) -> str | None:
        """The folder that says how the model was trained; the base is asked as the first adapter is."""
        return self.several.folders.get(name) or next(iter(self.several.folders.values()), None)


def check_chat(task: str, decoding: Decoding) -> None:
    """Before anything is loaded."""
    if task not in TEXT_TASKS:
        raise ConfigError(
            f"chat is for models that write text, this one is for {task}; use deltatune generate",
            field="task",
            found=task,
            expected=list(TEXT_TASKS),
        )
    if decoding.num_beams > 1:
        raise ConfigError("num_beams: beams cannot be shown while they are written; use 1", field="num_beams")
