"""The curves of a demo run as a picture: loss while training, and BLEU beside the share of weights that train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {"base": "#8a8a8a", "prefix": "#c2410c", "lora": "#1d4ed8", "full": "#15803d"}


def draw(outcomes: Sequence[dict[str, Any]], path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")  # not pyplot: no global state, no window
    FigureCanvasAgg(figure)
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    _curves(curves, outcomes)
    _bars(bars, outcomes)
    figure.savefig(path, dpi=130)
    return path


def _curves(axes: Any, outcomes: Sequence[dict[str, Any]]) -> None:
    untouched = [(0, outcome["dev_loss"]) for outcome in outcomes if not outcome["history"]]
    for outcome in outcomes:
        colour, history = COLOURS[outcome["key"]], outcome["history"]
        if not history:
            axes.axhline(outcome["dev_loss"], color=colour, linestyle=":", label=outcome["title"])
            continue
        train = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        dev = untouched + [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
        axes.plot(*zip(*train), color=colour, alpha=0.3, linewidth=1)
        axes.plot(*zip(*dev), color=colour, marker="o", markersize=3.5, label=outcome["title"])
    axes.set(xlabel="step", ylabel="loss per token", yscale="log", title="dev loss (thin: training loss)")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)


def _bars(axes: Any, outcomes: Sequence[dict[str, Any]]) -> None:
    places = range(len(outcomes))
    true = [outcome["scores"]["bleu"] for outcome in outcomes]
    other = [outcome["scores"]["swapped_bleu"] for outcome in outcomes]
    colours = [COLOURS[outcome["key"]] for outcome in outcomes]
    axes.bar([place - 0.2 for place in places], true, 0.4, color=colours)
    axes.bar([place + 0.2 for place in places], other, 0.4, color=colours, alpha=0.35, hatch="//")
    for place, value in zip(places, true):
        axes.text(place - 0.2, value + 1, f"{value:.0f}", ha="center", fontsize=9)
    labels = [f"{outcome['title']}\n{outcome['trainable'] / outcome['parameters']:.1%}" for outcome in outcomes]
    axes.set_xticks(list(places), [label.replace(" ", "\n", 1) for label in labels], fontsize=9)
    axes.set(ylim=(0, 108), title="test BLEU (hatched: against other records)")
    axes.spines[["top", "right"]].set_visible(False)
