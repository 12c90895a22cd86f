"""`deltatune plan`: whether a run fits and how long it takes, with the settings of `deltatune train`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from deltatune.cli.show import console, facts, quiet_libraries, table
from deltatune.cli.train import settings_of
from deltatune.errors import ConfigError
from deltatune.plan import Plan
from deltatune.report.words import duration, size

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
SHOWN = 8


def plan(
    words: Sequence[str],
    config: str | None,
    device: str | None,
    memory: str | None,
    devices: int,
    probing: bool,
    as_json: bool,
) -> bool:
    """Whether it fits, as far as that is known."""
    from deltatune.plan import plan as reckon
    from deltatune.train.detect import detected

    settings = detected(settings_of(words, config))
    quiet_libraries()
    made = reckon(settings, device=device, device_memory=bytes_of(memory), devices=devices, probing=probing)
    if as_json:
        told = {**asdict(made), "settings": settings.resolved(), "fits": made.fits, "seconds": made.seconds}
        print(json.dumps(told, indent=2, default=str))
    else:
        _show(made)
    return made.fits is not False


def bytes_of(text: str | None) -> int | None:
    """`24GB`, `24G`, `80GiB`, or a plain number of bytes."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if match is None:
        raise ConfigError(f"memory {text!r} is not understood; write it as 24GB or 80GiB", field="device_memory")
    power = " kmgt".index(match[2] or " ")
    unit = 1024**power if match[3] else _UNITS[match[2]]
    return int(float(match[1]) * unit)


def _show(made: Plan) -> None:
    out, memory = console(), made.memory
    settings, shape = made.settings, made.shape
    answer = f" and {shape.answer} of answers" if shape.answer else ""
    lines: list[tuple[str, Any]] = [
        (
            "job",
            f"{settings.method} on {settings.model_name_or_path}, {shape.rows} rows of {shape.tokens} tokens{answer}",
        ),
        ("parameters", f"{made.trained_parameters:,} of {made.parameters:,} train"),
        ("device", made.device + ("" if made.room is None else f", {size(made.room)}")),
    ]
    out.print(facts(lines))
    out.print()
    parts = [
        ("frozen parameters", memory.frozen),
        ("trained parameters", memory.trained),
        ("gradients", memory.gradients),
        ("optimizer states", memory.optimizer),
        ("activations", memory.activations),
        ("  logits among them", memory.logits),
        ("temporary, at the peak", memory.temporary),
        (f"tensors at most ({memory.peak_in})", memory.peak),
        ("with the process or context", made.resident),
    ]
    out.print(table(("memory", ""), [(name, size(value)) for name, value in parts], numbers="lr"))
    out.print()
    verdict = {True: "it fits", False: "it does not fit", None: "no memory is known to compare with"}[made.fits]
    timed = [("fits", verdict), ("a step", _brief(made.step_seconds))]
    if made.seconds is not None:
        timed.append(("the run", f"{duration(made.seconds)} for {made.steps:,} steps"))
    if made.probe is not None:
        probe = made.probe
        timed.append(("probe", f"{_brief(probe.seconds)} a step of {probe.shape.rows} x {probe.shape.tokens}"))
        timed.append(("", f"{probe.slower:.2f} times the reckoned time, {probe.peak:.2f} times the memory"))
    out.print(facts([*timed, *(("note", note) for note in made.notes)]))
    if made.choices:
        rows = [
            (_changes(choice.changes), size(choice.peak), _brief(choice.seconds), "yes" if choice.fits else "no")
            for choice in made.choices[:SHOWN]
        ]
        out.print()
        out.print(table(("settings", "memory", "a step", "fits"), rows, numbers="lrrr"))
    if made.spreads:
        rows = [
            (f"{s.way}, {s.devices} devices", size(s.states), size(s.gathered), size(s.peak), size(s.sent))
            for s in made.spreads
        ]
        out.print()
        out.print(table(("on each device", "states", "gathered", "peak", "sent a step"), rows, numbers="lrrrr"))


def _changes(changes: dict[str, Any]) -> str:
    if not changes:
        return "as asked for"
    return " ".join(
        f"{name}={json.dumps(value) if not isinstance(value, str) else value}" for name, value in changes.items()
    )


def _brief(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else duration(seconds)
