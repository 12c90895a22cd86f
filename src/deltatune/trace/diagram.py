"""The way of a batch as a small drawing: frozen boxes above, what trains below, gradients as dashed arrows."""

from __future__ import annotations

from dataclasses import dataclass

from deltatune.trace.report import DEAD, InputStop, PrefixStop, TraceReport
from deltatune.trace.words import name, number, plural, shape


@dataclass
class Box:
    title: str
    lines: list[str]
    kind: str  # frozen, train, dead or loss


@dataclass
class Way:
    """One drawing: what the tokens pass through, and what trains and joins them there."""

    title: str
    tokens: list[Box]
    trained: list[Box]


def ways(report: TraceReport) -> list[Way]:
    """One drawing for each prefix and each prompt at the input, one for all wrapped layers."""
    batch = Box("batch", [f"{key} {shape(size)}" for key, size in list(report.batch.items())[:1]], "frozen")
    loss = Box("loss", ["no loss" if report.loss.value is None else number(report.loss.value)], "loss")
    made = [
        Way(prefix.adapter, [batch, _attention(report, prefix), loss], _prefix(prefix)) for prefix in report.prefixes
    ]
    made += [Way(prompt.adapter, [batch, _embedding(prompt), loss], _prompt(prompt)) for prompt in report.inputs]
    if report.layers:
        layers = Box("wrapped layers", [plural(len(report.layers), "layer"), "weights frozen"], "frozen")
        made.append(Way(" + ".join(report.active), [batch, layers, loss], [_adapters(report)]))
    return made


def _attention(report: TraceReport, prefix: PrefixStop) -> Box:
    readers = {reader for part in prefix.parts for reader in part.readers}
    calls = [call for call in report.calls if call.module in readers]
    lengths = {f"keys {call.length_before} → {call.length_after}" for call in calls}
    keys = lengths.pop() if len(lengths) == 1 else f"keys + {prefix.virtual_tokens}"
    return Box("attention", [keys, f"{plural(len(calls), 'call')} of {len(report.calls)}"], "frozen")


def _prefix(prefix: PrefixStop) -> list[Box]:
    dead = sum(part.dead for part in prefix.parts)
    shapes = {shape(part.key_shape) for part in prefix.parts}
    each = f"each {shapes.pop()}" if len(shapes) == 1 else "of several shapes"
    return [
        Box("virtual tokens", [f"P = {prefix.virtual_tokens}"], "train"),
        Box(
            "prefix encoder",
            ["embedding → MLP" if prefix.projection else "embedding", f"rows {shape(prefix.steps[-1][1])}"],
            "train",
        ),
        Box(
            "keys, values",
            [plural(len(prefix.parts), "part"), f"{dead} without gradient" if dead else each],
            "dead" if dead else "train",
        ),
    ]


def _embedding(prompt: InputStop) -> Box:
    return Box("embedded tokens", [f"+ {prompt.virtual_tokens} rows in front", "outputs without them"], "frozen")


def _prompt(prompt: InputStop) -> list[Box]:
    dead = sum(part.size for part in prompt.parameters if part.gradient.state == DEAD)
    rows = [f"rows {shape(prompt.rows)}", *([f"{dead} without gradient"] if dead else [])]
    return [
        Box("virtual tokens", [f"P = {prompt.virtual_tokens}"], "train"),
        Box(name(prompt.where), rows, "dead" if dead else "train"),
    ]


def _adapters(report: TraceReport) -> Box:
    parts = [part for layer in report.layers for part in layer.adapters]
    dead = sum(part.dead for part in parts)
    ranks = sorted({part.rank for part in parts if part.rank is not None})
    rank = [f"r = {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")] if ranks else []
    count = f"{dead} without gradient" if dead else plural(len(parts), "adapter")
    classes = " + ".join(sorted({name(part.where) for part in parts}))
    return Box(classes, [*rank, count], "dead" if dead else "train")
