"""A trace for the terminal: a rich tree, clean at 80 columns; red is what gets no gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.text import Text
from rich.tree import Tree

from deltatune.trace import words
from deltatune.trace.groups import groups
from deltatune.trace.report import DEAD, LIVE, WAITING, Gradient, LayerStop, Parameter, Part, Stop, TraceReport

STYLES = {LIVE: "green", WAITING: "yellow", DEAD: "bold red"}
FIRST, LAST, MOST_DEAD = 4, 2, 6


def as_tree(report: TraceReport, every: bool = False) -> Tree:
    """The whole way as a tree. Long lists of like layers are shortened unless `every` is given; dead ones stay."""
    title = Text.assemble(
        ("trace ", "bold"),
        f"{words.name(report.task.base_class)} with ",
        (" + ".join(m.title for m in report.methods), "bold cyan"),
    )
    title.append("\nbatch " + ", ".join(f"{key} {words.shape(size)}" for key, size in report.batch.items()), "dim")
    root = Tree(title, guide_style="dim")
    show = _Show(report, every)
    for number, stop in enumerate(report.stops, 1):
        show.stop(root, number, stop)
    return root


class _Show:
    """Puts stops and their details under a tree."""

    def __init__(self, report: TraceReport, every: bool) -> None:
        self.report, self.every = report, every

    def stop(self, root: Tree, number: int, stop: Stop) -> None:
        label = Text.assemble((f"{number} ", "dim"), (stop.name, "bold red" if stop.dead else "bold"))
        label.append(f"  {stop.where}", "dim cyan")
        label.append("\n" + stop.summary, "red" if stop.dead else "")
        node = root.add(label)
        details = {
            "config": self.config,
            "registry": self.method,
            "prefix encoder": self.encoder,
            "keys and values": self.parts,
            "prompt": self.prompt,
            "attention": self.attention,
            "wrapped layers": self.layers,
            "trained copies": self.copies,
            "loss": self.loss,
            "gradient": self.gradient,
        }
        if stop.name in details:
            details[stop.name](node, stop.index)

    def config(self, node: Tree, index: int) -> None:
        fields = self.report.configs[index].fields
        hidden = ("peft_type", "peft_version", "auto_mapping", "site_names", "site_shapes", "inference_mode")
        shown = [f"{key}={_short(value)}" for key, value in fields.items() if key not in hidden]
        node.add(Text(", ".join(shown), "dim"))

    def method(self, node: Tree, index: int) -> None:
        node.add(Text(self.report.methods[index].formula, "dim"))

    def encoder(self, node: Tree, index: int) -> None:
        for parameter in self.report.prefixes[index].parameters:
            node.add(_parameter(parameter))

    def prompt(self, node: Tree, index: int) -> None:
        for parameter in self.report.inputs[index].parameters:
            node.add(_parameter(parameter))

    def parts(self, node: Tree, index: int) -> None:
        prefix = self.report.prefixes[index]
        if prefix.shift:
            node.add(Text(f"layout 'peft': positions of the tokens move by {prefix.shift}", "dim"))
        self._few(node, prefix.parts, [part.dead for part in prefix.parts], _part)

    def attention(self, node: Tree, index: int) -> None:
        for group in groups(self.report.calls):
            label = Text(group.title, "bold" if group.call.prefix else "dim")
            for name, text in group.facts:
                label.append(f"\n{name:<8}", "dim")
                label.append(text, "cyan" if "→" in text else "")
            branch = node.add(label)
            if group.call.prefix or self.every:
                modules = [call.module for call in group.calls]
                self._few(branch, modules, [False] * len(modules), Text)

    def layers(self, node: Tree, index: int) -> None:
        found = self.report.layers
        self._few(node, found, [any(part.dead for part in layer.adapters) for layer in found], _layer)

    def copies(self, node: Tree, index: int) -> None:
        for kept in self.report.copies:
            branch = node.add(Text(kept.path))
            self._few(branch, kept.parameters, [p.gradient.state == DEAD for p in kept.parameters], _parameter)

    def loss(self, node: Tree, index: int) -> None:
        shapes = [f"{key} {words.shape(size)}" for key, size in self.report.loss.output.items() if size]
        node.add(Text("output: " + ", ".join(shapes), "dim"))

    def gradient(self, node: Tree, index: int) -> None:
        total = self.report.gradient
        node.add(Text(f"{total.frozen:,} numbers of the base are frozen and get none", "dim"))
        self._few(node, total.others, [p.gradient.state == DEAD for p in total.others], _parameter)
        dead = self.report.dead
        for name in dead if self.every else dead[:MOST_DEAD]:
            node.add(Text(f"no gradient: {name}", STYLES[DEAD]))
        if len(dead) > MOST_DEAD and not self.every:
            node.add(Text(f"no gradient: … {len(dead) - MOST_DEAD} more", STYLES[DEAD]))

    def _few(self, node: Tree, items: Sequence[Any], dead: Sequence[bool], draw: Any) -> None:
        """The first and the last of many, and the first dead ones; what is left out is counted."""
        kept = set(range(len(items)))
        if not self.every and len(items) > FIRST + LAST + 1:
            kept = {*range(FIRST), *range(len(items) - LAST, len(items))}
            kept |= set([index for index, is_dead in enumerate(dead) if is_dead][:MOST_DEAD])
        for run in _runs(len(items), kept):
            if len(run) == 1:
                node.add(draw(items[run[0]]))
            else:
                gone = sum(dead[index] for index in run)
                node.add(
                    Text(
                        f"… {len(run)} more" + (f", {gone} without gradient" if gone else ""), "red" if gone else "dim"
                    )
                )


def _runs(count: int, kept: set[int]) -> Iterable[list[int]]:
    """Kept indices one by one, the others in stretches."""
    run: list[int] = []
    for index in range(count):
        if index not in kept:
            run.append(index)
            continue
        if run:
            yield run
        yield [index]
        run = []
    if run:
        yield run


def _part(part: Part) -> Text:
    text = Text(part.site, "bold red" if part.dead else "")
    if part.readers and part.readers != [part.site]:
        text.append("\nread by " + ", ".join(part.readers), "dim")
    text.append(f"\nK {words.shape(part.key_shape)}  V {words.shape(part.value_shape)}", "dim")
    if part.dead:
        return text.append(f"  no gradient: {part.key.reason}", STYLES[DEAD])
    for name, gradient in (("K", part.key), ("V", part.value)):
        text.append(f"  grad {name} ", "dim").append_text(_gradient(gradient))
    return text


def _layer(layer: LayerStop) -> Text:
    text = Text(layer.path, "bold red" if any(part.dead for part in layer.adapters) else "")
    text.append(f"  {layer.layer_class} {'' if layer.weight is None else words.shape(layer.weight)}", "dim")
    if layer.calls:
        text.append(f"\nin {words.shape(layer.input_shape)}  out {words.shape(layer.output_shape)}", "dim")
    else:
        text.append("\nnot called in this batch", "red")
    for part in layer.adapters:
        rank = "" if part.rank is None else f"r {part.rank}  "
        scaling = "" if part.scaling is None else f"scaling {words.number(part.scaling)}  "
        norms = f"|W| {words.number(part.base_norm)}  |ΔW| {words.number(part.delta_norm)}"
        norms = "no change of the weight" if part.delta_norm is None else norms
        prefix = f"{part.adapter}: " if len(layer.adapters) > 1 else ""
        text.append(f"\n{prefix}{rank}{scaling}{norms}")
        if part.dead:
            text.append(f"\nno gradient: {part.parameters[0].gradient.reason}", STYLES[DEAD])
            continue
        text.append("\ngrad", "dim")
        for parameter in part.parameters:
            text.append(f"  {parameter.name.removesuffix('.weight')} ", "dim").append_text(
                _gradient(parameter.gradient)
            )
    return text


def _parameter(parameter: Parameter) -> Text:
    text = Text(f"{parameter.name} ")
    text.append(words.shape(parameter.shape), "dim").append("  grad ", "dim").append_text(_gradient(parameter.gradient))
    if parameter.gradient.state == LIVE and parameter.gradient.zeros:
        share = words.share(parameter.gradient.zeros, parameter.size)
        text.append(f"  {share} of it exactly zero", "yellow")
    elif parameter.gradient.reason:
        text.append(f"  {parameter.gradient.reason}", STYLES.get(parameter.gradient.state, "dim"))
    return text


def _gradient(gradient: Gradient) -> Text:
    if gradient.state in (LIVE, WAITING):
        words_ = words.number(gradient.norm) if gradient.state == LIVE else "0 (waits)"
        return Text(words_, STYLES[gradient.state])
    return Text("none" if gradient.state == DEAD else gradient.state, STYLES.get(gradient.state, "dim"))


def _short(value: Any, most: int = 40) -> str:
    text = str(value) if not isinstance(value, list) else ",".join(map(str, value))
    return text if len(text) <= most else text[: most - 1] + "…"
