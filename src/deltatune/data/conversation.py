"""Conversations out of rows: OpenAI's messages, sharegpt's turns, and single exchanges with system and history.

| form | a row |
|---|---|
| messages | `messages`: a list of `{"role", "content"}`, with `tool_calls` and a column `tools` |
| sharegpt | `conversations`: a list of `{"from", "value"}`, `human` and `gpt` in turn |
| one exchange | `instruction`+`input`/`output`, `prompt`/`completion`, ...; `system` and `history` beside them |
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from deltatune.data.example import Columns, Example, Fault, absent, kind, short, string
from deltatune.suggest import did_you_mean

MESSAGES = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")
SYSTEM, TOOLS, HISTORY = "system", "tools", "history"
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
_LISTED = "a list of messages, each with role and content"


@dataclass(frozen=True)
class Conversation(Example):
    """`messages` as chat templates read them, up to the last one of the assistant, which `target` is the text of.

    `text` is what stands before it, as people read it. A message with `weight` 0 is not learnt.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[Any, ...] | None = None

    @classmethod
    def of(cls, text: str) -> Conversation:
        """What a user says first."""
        return cls(text, None, 0, ({"role": "user", "content": text},))

    @classmethod
    def exchange(cls, text: str, answer: str) -> Conversation:
        """What a user says, and the answer."""
        messages = ({"role": "user", "content": text}, {"role": "assistant", "content": answer})
        return cls(text, answer, 0, messages)

    @property
    def asked(self) -> tuple[dict[str, Any], ...]:
        """The messages before the last answer."""
        return self.messages if self.target is None else self.messages[:-1]


def conversation(row: dict[str, Any], columns: Columns, line: int) -> Conversation:
    """A row checked; a fault names the message and its part."""
    messages = _listed(row, columns) if columns.form == "messages" else _exchange(row, columns)
    if columns.system is not None and row.get(columns.system) and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": string(row, columns.system)})
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise Fault(columns.inputs[0], "has no message of the assistant", "an answer to learn")
    messages = messages[: answers[-1] + 1]
    return Conversation(
        _transcript(messages[:-1]), _content(messages[-1]), line, tuple(messages), _tools(row, columns.tools)
    )


def _listed(row: dict[str, Any], columns: Columns) -> list[dict[str, Any]]:
    (name,) = columns.inputs
    if name not in row:
        raise Fault(name, absent(name, row), _LISTED)
    value = _decoded(row[name], name, _LISTED)
    if not isinstance(value, list):
        raise Fault(name, f"is {kind(value)}", _LISTED)
    if not value:
        raise Fault(name, "is empty", _LISTED)
    return [_message(message, f"{name}[{place}]") for place, message in enumerate(value)]


def _exchange(row: dict[str, Any], columns: Columns) -> list[dict[str, Any]]:
    assert columns.target is not None
    first, *rest = columns.inputs
    parts = [string(row, first), *(string(row, name, blank=True, missing=True) for name in rest)]
    asked = "\n".join(part for part in parts if part.strip())
    made = []
    for place, pair in enumerate(_history(row, columns.history)):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(each, str) for each in pair):
            raise Fault(f"{columns.history}[{place}]", f"is {kind(pair)}", "a pair of texts: what was said, the answer")
        made += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return [*made, {"role": "user", "content": asked}, {"role": "assistant", "content": string(row, columns.target)}]


def _history(row: dict[str, Any], name: str | None) -> list[Any]:
    value = [] if name is None else _decoded(row.get(name), name, "a list of pairs") or []
    if not isinstance(value, list):
        raise Fault(name or "", f"is {kind(value)}", "a list of pairs: what was said, the answer")
    return value


def _message(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Fault(place, f"is {kind(value)}", "a message with role and content")
    sharegpt = "from" in value and "role" not in value
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    if role_key not in value:
        raise Fault(f"{place}.{role_key}", absent(role_key, value), "a role")
    role = value[role_key]
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        near = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        raise Fault(f"{place}.{role_key}", f"is {short(role)}{near}", f"one of {', '.join(ROLES)}")
    made: dict[str, Any] = {"role": known}
    calls = value.get("tool_calls")
    if role == "function_call":
        calls = [{"type": "function", "function": _decoded(value.get(content_key), f"{place}.{content_key}", "a call")}]
    else:
        content = _text(value, content_key, f"{place}.{content_key}", optional=bool(calls))
        if content is not None:
            made["content"] = content
    if calls:
        made["tool_calls"] = _calls(calls, f"{place}.tool_calls")
    kept = ("name", "tool_call_id", "reasoning_content", "thinking")
    made |= {key: value[key] for key in kept if value.get(key) is not None}
    weight = value.get("weight", 1 if value.get("train", True) else 0)
    if weight not in (0, 1):
        raise Fault(f"{place}.weight", f"is {kind(weight)}", "0 (not learnt) or 1")
    if weight == 0:
        made["weight"] = 0
    return made


def _text(message: dict[str, Any], key: str, place: str, optional: bool) -> str | None:
    if key not in message and not optional:
        raise Fault(place, absent(key, message), "text")
    value = message.get(key)
    if value is None and optional:
        return None
    if isinstance(value, list):  # OpenAI's parts
        for number, part in enumerate(value):
            if (
                not isinstance(part, dict)
                or part.get("type", "text") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise Fault(
                    f"{place}[{number}]", f"is {kind(part)}", "a part of type text; others cannot be learnt here"
                )
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise Fault(place, f"is {kind(value)}", "text")
    if not value.strip() and not optional and message.get("role", message.get("from")) not in ("system", "tool"):
        raise Fault(place, "is empty", "text")
    return value


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    expected = 'a list of {"function": {"name", "arguments"}}'
    if not isinstance(value, list):
        raise Fault(place, f"is {kind(value)}", expected)
    made = []
    for number, call in enumerate(value):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Fault(f"{place}[{number}]", f"is {kind(call)}", expected)
        # templates write the arguments as JSON themselves, OpenAI's are that already
        arguments = _decoded(function.get("arguments", {}), f"{place}[{number}].function.arguments", "an object")
        if not isinstance(arguments, dict):
            raise Fault(f"{place}[{number}].function.arguments", f"is {kind(arguments)}", "an object")
        called = {**function, "arguments": arguments}
        extra = {"id": call["id"]} if call.get("id") else {}
        made.append({**extra, "type": "function", "function": called})
    return made


def _tools(row: dict[str, Any], name: str | None) -> tuple[Any, ...] | None:
    value = None if name is None else _decoded(row.get(name), name, "a list of tools")
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Fault(name or "", f"is {kind(value)}", "a list of tools, each a JSON schema")
    return tuple(value)


def _decoded(value: Any, place: str, expected: str) -> Any:
    """csv and parquet hold lists as JSON text."""
    if not isinstance(value, str) or not value.strip():
        return None if value == "" else value
    try:
        return json.loads(value)
    except ValueError as error:
        raise Fault(place, f"is {short(value)}, which is no JSON ({error})", expected) from None


def _content(message: dict[str, Any]) -> str:
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join([*([message["content"]] if message.get("content") else []), *calls])


def _transcript(messages: list[dict[str, Any]]) -> str:
    """A single question as it is; more than that with who says what."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {_content(message)}" for message in messages)
