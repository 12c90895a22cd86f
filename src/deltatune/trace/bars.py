"""How much gradient arrived where, as bars of like scale: what the page draws first."""

from __future__ import annotations

from dataclasses import dataclass

from deltatune.trace.report import DEAD, LIVE, Gradient, TraceReport
from deltatune.trace.words import number


@dataclass
class Bar:
    """One bar; `share` in per cent of the longest of its chart."""

    name: str
    text: str
    share: float
    state: str


@dataclass
class Row:
    label: str
    bars: list[Bar]
    dead: bool
    reason: str = ""


@dataclass
class Chart:
    title: str
    rows: list[Row]


def charts(report: TraceReport) -> list[Chart]:
    """A chart per prefix, over its parts, and one over all wrapped layers."""
    made = []
    for prefix in report.prefixes:
        rows = [
            Row(
                part.site, [_bar("K", part.key), _bar("V", part.value)], part.dead, part.key.reason if part.dead else ""
            )
            for part in prefix.parts
        ]
        made.append(Chart(f"Gradient of the keys and values of {prefix.adapter!r}, by attention", rows))
    if report.layers:
        rows = [
            Row(
                layer.path if len(layer.adapters) == 1 else f"{layer.path} · {part.adapter}",
                [_bar(p.name.removesuffix(".weight"), p.gradient) for p in part.parameters],
                part.dead,
                part.parameters[0].gradient.reason if part.dead else "",
            )
            for layer in report.layers
            for part in layer.adapters
        ]
        made.append(Chart("Gradient of the adapters, by layer", rows))
    for chart in made:
        _scale(chart)
    return made


def _bar(name: str, gradient: Gradient) -> Bar:
    norm = gradient.norm or 0.0
    text = {LIVE: number(gradient.norm), DEAD: "none"}.get(gradient.state, gradient.state)
    return Bar(name, text, norm, gradient.state)


def _scale(chart: Chart) -> None:
    longest = max((bar.share for row in chart.rows for bar in row.bars), default=0.0)
    for row in chart.rows:
        for bar in row.bars:
            bar.share = max(100 * bar.share / longest, 1.0) if longest and bar.share else 0.0
