"""Loss curves as one inline SVG: training (raw and smoothed) and evaluation, with scales that people read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 14, 30

Points = Sequence[tuple[float, float]]


def loss_curves(history: Sequence[dict[str, Any]], before: float | None = None) -> str:
    """The SVG; empty when the history has no loss. `before` is the evaluation loss at step 0."""
    train = [(entry["step"], entry["loss"]) for entry in history if _finite(entry.get("loss"))]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in history if _finite(entry.get("eval_loss"))]
    if _finite(before) and before is not None:
        held_out = [(0, before), *held_out]
    if not train and not held_out:
        return ""
    values = [y for _, y in [*train, *held_out]]
    last = max(x for x, _ in [*train, *held_out]) or 1
    steps = [x for x in ticks(0, last, 7) if x <= last]
    losses = ticks(min(values), max(values), 6)
    across = _scale(0, last, LEFT, WIDTH - RIGHT)
    down = _scale(losses[0], losses[-1], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss by step" class="curves">',
        *(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}" class="grid"/>'
            f'<text x="{LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
            for y in losses
        ),
        *(f'<text x="{across(x):.1f}" y="{HEIGHT - 12}" text-anchor="middle">{x:g}</text>' for x in steps),
        f'<text x="{LEFT - 12}" y="{HEIGHT - 12}" text-anchor="end">step</text>',
        _line(train, across, down, "train raw"),
        _line(smooth(train), across, down, "train"),
        _line(held_out, across, down, "eval"),
        *(
            f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3" class="eval">'
            f"<title>step {x:g}: {y:.4f}</title></circle>"
            for x, y in held_out
        ),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) that cover low to high."""
    largest = max(abs(low), abs(high))
    largest = largest if largest > 1e-30 else 1.0
    spread = high - low if high - low > 1e-6 * largest else largest  # a flat curve has no scale of its own
    rough = spread / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{step * i:.10g}") for i in range(first, max(last, first + 1) + 1)]


def smooth(points: Points, window: int = 0) -> list[tuple[float, float]]:
    """A running mean; the window is a fifteenth of the points when it is not given."""
    width = window or max(1, len(points) // 15)
    result = []
    for i, (x, _) in enumerate(points):
        near = points[max(0, i - width) : i + width + 1]
        result.append((x, sum(y for _, y in near) / len(near)))
    return result


def _line(points: Points, across: Any, down: Any, kind: str) -> str:
    if len(points) < 2:
        return ""
    path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
    return f'<polyline points="{path}" class="{kind}"/>'


def _scale(low: float, high: float, start: float, end: float) -> Any:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
