"""Attention calls that differ in nothing but their module, together."""

from __future__ import annotations

from dataclasses import dataclass

from deltatune.trace.report import AttentionCall
from deltatune.trace.words import change, plural, shape

KINDS = {"encoder": "encoder self-attention", "self": "self-attention", "cross": "cross-attention"}


@dataclass
class Group:
    calls: list[AttentionCall]

    @property
    def call(self) -> AttentionCall:
        return self.calls[0]

    @property
    def title(self) -> str:
        what = "with a prefix" if self.call.prefix else "no prefix here"
        return f"{plural(len(self.calls), 'call')} of {KINDS.get(self.call.kind, 'attention')}, {what}"

    @property
    def facts(self) -> list[tuple[str, str]]:
        call = self.call
        length = str(call.length_before)
        if call.length_after != call.length_before:
            length += f" → {call.length_after}"
        mask = change(call.mask_before, call.mask_after)
        if call.mask_after is not None or call.mask_type != "none":
            mask += f" {call.mask_type}"
        found = [("query", shape(call.query)), ("keys", length), ("mask", mask)]
        if call.bias_after is not None:
            found.append(("bias", change(call.bias_before, call.bias_after)))
        return [*found, ("backend", call.backend)]


def groups(calls: list[AttentionCall]) -> list[Group]:
    """In the order of their first calls."""
    found: dict[tuple[str, ...], Group] = {}
    for call in calls:
        group = Group([call])
        key = (call.kind, call.module_class, str(call.prefix), *(text for _, text in group.facts))
        if key in found:
            found[key].calls.append(call)
        else:
            found[key] = group
    return list(found.values())
