"""The stops of the way, in order, one line each: what both renderings and `report.stops` go by."""

from __future__ import annotations

from deltatune.prompts import attention
from deltatune.trace.report import DEAD, LIVE, Stop, TraceReport
from deltatune.trace.watch import where
from deltatune.trace.words import name, number, plural, shape, share


def stops(report: TraceReport) -> list[Stop]:
    made: list[Stop] = []
    for index, config in enumerate(report.configs):
        summary = f"{name(config.where)}, adapter {config.adapter!r}"
        made.append(Stop("config", config.where, summary, "configs", index=index))
    for index, method in enumerate(report.methods):
        summary = f"{method.method} trains {name(method.trained_class)}"
        made.append(Stop("registry", method.where, summary, "methods", index=index))
    task = report.task
    made.append(
        Stop(
            "task class",
            task.where,
            f"{name(task.where)} around {name(task.base_class)}: {task.trainable:,} of {task.total:,} parameters train "
            f"({share(task.trainable, task.total)})",
            "task",
        )
    )
    for index, prompt in enumerate(report.inputs):
        tokens = report.batch.get("input_ids") or report.batch.get("inputs_embeds")
        before = " and ".join(f"{count} before what {path} gives" for path, count in prompt.sides.items())
        summary = f"rows {shape(prompt.rows)}, {before}"
        if tokens:
            summary += f": {tokens[1]} tokens become {tokens[1] + prompt.virtual_tokens}, outputs keep {tokens[1]}"
        made.append(Stop("prompt", prompt.where, summary, "inputs", index=index))
    for index, prefix in enumerate(report.prefixes):
        way = " → ".join(f"{step} {shape(size)}" for step, size in prefix.steps)
        made.append(Stop("prefix encoder", prefix.where, way, "prefixes", index=index))
        dead = sum(part.dead for part in prefix.parts)
        summary = f"keys and values for {plural(len(prefix.parts), 'attention')}, computed once per forward pass"
        if dead:
            summary += f"; {dead} of {len(prefix.parts)} receive no gradient"
        made.append(Stop("keys and values", prefix.where_cut, summary, "prefixes", bool(dead), index))
    if report.prefixes:
        with_prefix = [call for call in report.calls if call.prefix]
        made.append(
            Stop(
                "attention",
                where(attention.attend),
                f"{plural(len(report.calls), 'call')}, {len(with_prefix)} of them with a prefix",
                "calls",
            )
        )
    if report.layers:
        dead = sum(part.dead for layer in report.layers for part in layer.adapters)
        summary = plural(len(report.layers), "layer") + " wrapped"
        if dead:
            summary += f"; {plural(dead, 'adapter')} without any gradient"
        silent = any(
            p.gradient.state == DEAD for layer in report.layers for part in layer.adapters for p in part.parameters
        )
        made.append(Stop("wrapped layers", report.layers[0].where, summary, "layers", silent))
    if report.copies:
        parameters = [parameter for kept in report.copies for parameter in kept.parameters]
        live = sum(parameter.gradient.state == LIVE for parameter in parameters)
        dead = sum(parameter.gradient.state == DEAD for parameter in parameters)
        summary = f"{plural(len(report.copies), 'module')} trained whole, {live} of {len(parameters)} tensors live"
        made.append(Stop("trained copies", report.copies[0].where, summary, "copies", bool(dead)))
    summary = report.loss.note or f"loss {number(report.loss.value)}, computed by {name(report.loss.computed_by)}"
    made.append(
        Stop("loss", report.loss.where, summary, "loss", bool(report.loss.value is None and report.gradient.dead))
    )
    made.append(_gradient(report))
    return made


def _gradient(report: TraceReport) -> Stop:
    total = report.gradient
    if report.loss.value is None and not report.loss.note.startswith("the loss is not finite"):
        summary = total.note or "no loss, no gradients"
    elif total.note:
        summary = total.note
    else:
        reached = f"{total.live:,} of {total.elements:,} trainable numbers"
        summary = f"{reached} ({share(total.live, total.elements)}) received gradient, norm {number(total.norm)}"
        if total.waiting:
            summary += f"; {total.waiting:,} wait for the second step"
        if total.dead:
            summary += f"; {total.dead:,} ({share(total.dead, total.elements)}) receive none"
    return Stop("gradient", total.where, summary, "gradient", bool(total.dead))
