"""A conversation as token numbers, and which of them are learnt: what the tokenizer's chat template makes of it.

What the assistant says is found by the template's own `{% generation %}` marks. Where it has none, the conversation is
rendered up to each answer and past it: an answer is what the second has beyond the first. That holds only if the
template writes the beginning of a conversation as it writes the whole; one that does not is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from deltatune.data.conversation import Conversation
from deltatune.data.example import Fault

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]  # from the first to before the second: characters, or tokens


@dataclass(frozen=True)
class Rendered:
    """Token numbers, and of each whether it is learnt."""

    ids: list[int]
    learnt: list[bool]


def render(tokenizer: Any, example: Conversation, train_on: str) -> Rendered:
    """`train_on`: 'assistant' (all of its turns), 'last' (its last one), 'all' (every token).

    Raises:
        Fault: The template does not take the conversation, or answers cannot be told apart in what it writes.
    """
    text = _text(tokenizer, example, example.messages)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(found["input_ids"]), found["offset_mapping"]
    answers = [place for place, message in enumerate(example.messages) if message["role"] == "assistant"]
    wanted = [place for place in answers if example.messages[place].get("weight", 1)]
    if train_on == "all":
        learnt = [True] * len(ids)
    else:
        if train_on == "last":
            wanted = wanted[-1:]
        if _GENERATION.search(tokenizer.get_chat_template(None, example.tools)):
            spans = _marked(tokenizer, example, answers, wanted)
        else:
            spans = [_between(tokenizer, example, place, text) for place in wanted]
        learnt = [False] * len(ids)
        for start, end in (_tokens(offsets, span, text) for span in spans):
            end = _with_closing_mark(tokenizer, ids, start, end)
            learnt[start:end] = [True] * (end - start)
    if not _stops(tokenizer, ids) and any(learnt):
        # an answer without an end would teach the model never to stop; nothing may stand between the two
        last = max(place for place, told in enumerate(learnt) if told) + 1
        if not tokenizer.decode(ids[last:]).strip():
            ids, learnt = [*ids[:last], tokenizer.eos_token_id], [*learnt[:last], True]
    return Rendered(ids, learnt)


def prompt_ids(tokenizer: Any, example: Conversation) -> list[int]:
    """What generation starts from: everything before the last answer, and the mark that one begins."""
    text = _text(tokenizer, example, example.asked, prompt=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _text(tokenizer: Any, example: Conversation, messages: Sequence[dict[str, Any]], prompt: bool = False) -> str:
    return _written(tokenizer, example, messages, prompt)[0]


def _written(
    tokenizer: Any, example: Conversation, messages: Sequence[dict[str, Any]], prompt: bool = False, marks: bool = False
) -> tuple[str, list[Span]]:
    """What the template writes, and where it marks answers (transformers' own renderer, in its sandbox)."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    shown = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    tools = None if example.tools is None else list(example.tools)
    try:
        texts, found = cast(Any, render_jinja_template)(
            conversations=[shown],
            tools=tools,
            chat_template=tokenizer.get_chat_template(None, tools),
            return_assistant_tokens_mask=marks,
            add_generation_prompt=prompt,
            **tokenizer.special_tokens_map,
        )
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise Fault(
            "messages", f"are not taken by the chat template ({reason})", "what the template can write"
        ) from error
    return texts[0], [(start, end) for start, end in found[0]] if marks else []


def _marked(tokenizer: Any, example: Conversation, answers: list[int], wanted: list[int]) -> list[Span]:
    """The answers by the template's own marks, as characters."""
    spans = _written(tokenizer, example, example.messages, marks=True)[1]
    if len(spans) == len(answers):
        return [spans[answers.index(place)] for place in wanted]
    if wanted == answers and spans:
        return spans  # such as of a template that writes an answer in two parts
    raise Fault("messages", f"have {len(answers)} answers, of which the chat template marks {len(spans)}", "as many")


def _between(tokenizer: Any, example: Conversation, place: int, whole: str) -> Span:
    """The answer at `place` of the messages, as characters of the whole conversation."""
    before = _text(tokenizer, example, example.messages[:place], prompt=True)
    after = _text(tokenizer, example, example.messages[: place + 1])
    if not (after.startswith(before) and whole.startswith(after)):
        raise Fault(
            f"messages[{place}]",
            "cannot be told apart, because the chat template writes the beginning of a conversation unlike the whole",
            "a template with {% generation %} marks (chat_template: FILE), or train_on: last, or train_on: all",
        )
    return len(before), len(after)


def _tokens(offsets: Sequence[Span], span: Span, text: str) -> Span:
    """The tokens of a span of characters; one that begins before it counts where it holds more of it than blanks."""
    begin, end = span
    inside = [
        place
        for place, (start, stop) in enumerate(offsets)
        if start < end and stop > begin and (start >= begin or text[begin : min(stop, end)].strip())
    ]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _with_closing_mark(tokenizer: Any, ids: list[int], start: int, end: int) -> int:
    """Where an answer ends: with its closing mark, not before it, nor with the line break that follows it."""
    if end < len(ids) and ids[end] == tokenizer.eos_token_id and ids[end - 1] != tokenizer.eos_token_id:
        return end + 1
    special = _special(tokenizer)
    last = next((place for place in range(end - 1, start - 1, -1) if ids[place] in special), None)
    if last is None or tokenizer.decode(ids[last + 1 : end]).strip():
        return end
    return last + 1


def _stops(tokenizer: Any, ids: list[int]) -> bool:
    """Whether the conversation ends in a mark that ends generation, blanks behind it left aside."""
    if tokenizer.eos_token_id is None:
        return True
    special = _special(tokenizer)
    last = next((place for place in range(len(ids) - 1, -1, -1) if ids[place] in special), None)
    return last is not None and not tokenizer.decode(ids[last + 1 :]).strip()


def _special(tokenizer: Any) -> set[int]:
    """Marks that could end a turn."""
    return {tokenizer.eos_token_id, *tokenizer.all_special_ids} - {tokenizer.bos_token_id, tokenizer.unk_token_id}
