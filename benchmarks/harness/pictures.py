"""Pictures of docs/performance.md: one look for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

TITLES = {"deltatune": "deltatune", "peft": "PEFT 0.21.2", "merged": "deltatune, merged", "floor": "frozen model"}
COLOURS = {"deltatune": "#0f6fb5", "peft": "#d1702a", "merged": "#7fb3d8", "floor": "#777777"}
MARKERS = {"deltatune": "o", "peft": "s", "merged": "D", "floor": ""}


def figure(
    columns: int = 1, rows: int = 1, width: float = 8.0, height: float = 4.0, **options: Any
) -> tuple[Figure, Any]:
    """A figure and its axes, always as an array of rows and columns."""
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e5e5e5", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=9, color="#999999")
    return made, axes


def save(made: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=140, facecolor="white", metadata={"Software": None})


def lines(ax: Any, curves: Mapping[str, Mapping[Any, Any]]) -> None:
    """One curve for each package, x -> summary with quartiles, which are shaded."""
    for name, curve in curves.items():
        x = sorted(curve)
        if not x:
            continue
        colour = COLOURS[name]
        ax.plot(
            x, [curve[k]["median"] for k in x], marker=MARKERS[name], color=colour, ms=5, lw=1.8, label=TITLES[name]
        )
        ax.fill_between(x, [curve[k]["low"] for k in x], [curve[k]["high"] for k in x], color=colour, alpha=0.15, lw=0)


def dots(ax: Any, labels: Sequence[str], found: Mapping[str, Sequence[Mapping[str, float] | None]]) -> None:
    """A row for each label, in it a dot for each package with a line from quartile to quartile."""
    shift = {name: (place - (len(found) - 1) / 2) * 0.22 for place, name in enumerate(found)}
    for name, values in found.items():
        there = [(place + shift[name], value) for place, value in enumerate(values) if value is not None]
        y, colour = [place for place, _ in there], COLOURS[name]
        ax.hlines(y, [v["low"] for _, v in there], [v["high"] for _, v in there], color=colour, lw=1.4, alpha=0.6)
        ax.plot([v["median"] for _, v in there], y, ls="", marker=MARKERS[name], ms=5, color=colour, label=TITLES[name])
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)


def plain_ticks(axis: Any, ticks: Sequence[float], show: Callable[[float], str] = lambda value: f"{value:g}") -> None:
    """These ticks and no others, in plain figures, also where the axis is logarithmic."""
    axis.set_ticks(list(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(which="minor", length=0)


def legend(made: Figure, ax: Any, columns: int = 4) -> None:
    handles, labels = ax.get_legend_handles_labels()
    made.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
