"""Scores against what they cost: parameters that train, and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEST, OTHER = "#c2410c", "#475569"
_AROUND = [(7, y) for y in (5, -13, 17, -25, 29, -37)]  # of a point, in points


@dataclass(frozen=True)
class Point:
    """A candidate in the picture; `error` is half of its interval, below and above."""

    name: str
    score: float
    error: tuple[float, float] | None
    parameters: float
    memory: float | None  # None where it is that of several candidates
    best: bool  # or within noise of the best


Places = Sequence[tuple[Point, float]]  # with where it stands on the axis of costs


def draw(points: Sequence[Point], metric: str, lower_is_better: bool, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")  # not pyplot: no global state, no window
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    by_size: Places = [(point, point.parameters) for point in points]
    by_memory: Places = [(point, point.memory / 1e6) for point in points if point.memory is not None]
    _scatter(left, by_size)
    _scatter(right, by_memory)
    left.set(xscale="log", xlabel="parameters that train", ylabel=f"held-out {metric}")
    right.set(xlabel="peak memory (MB)")
    better = "lower" if lower_is_better else "higher"
    told = any(point.best for point in points)
    colours = "; orange: the best and what is within noise of it" if told else "; differences cannot be told from noise"
    bars = "; bars: 95 %" if any(point.error for point in points) else ""
    figure.suptitle(f"{better} is better{colours}{bars}", fontsize=10)
    figure.canvas.draw()  # what is where is known from here on
    _name(left, by_size)
    _name(right, by_memory)
    figure.savefig(path, dpi=130)
    return path


def _scatter(axes: Any, places: Places) -> None:
    if not places:
        axes.text(0.5, 0.5, "not measured: all trained in one pass", ha="center", transform=axes.transAxes)
    for point, x in places:
        colour = BEST if point.best else OTHER
        bars = None if point.error is None else [[point.error[0]], [point.error[1]]]
        axes.errorbar(x, point.score, yerr=bars, fmt="o", color=colour, capsize=3, markersize=6)
    axes.margins(x=0.2, y=0.12)  # names stand to the right of their points
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _name(axes: Any, places: Places) -> None:
    """A name beside every point: the first of the places around it where no other name stands."""
    taken: list[Any] = []
    for point, x in sorted(places, key=lambda place: place[0].score, reverse=True):
        colour = BEST if point.best else OTHER
        told = axes.annotate(
            point.name, (x, point.score), xytext=_AROUND[0], textcoords="offset points", fontsize=9, color=colour
        )
        for offset in _AROUND:
            told.set_position(offset)
            box = told.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
