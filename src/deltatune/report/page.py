"""The page: everything a run left, put into one template."""

from __future__ import annotations

import json
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any

from deltatune.report.curves import loss_curves
from deltatune.report.sites import AdapterMap, Cell, adapter_map
from deltatune.report.words import duration, plural, share, size
from deltatune.storage.files import write_files
from deltatune.storage.locate import is_repository
from deltatune.train.result import TrainResult

NAME = "report.html"
# scores of which more is better, and those of which less is
RISING = {"bleu", "rouge_l", "exact_match", "accuracy", "macro_f1", "precision", "recall", "f1"}


def write_report(result: TrainResult, command: str | None = None) -> Path:
    """Write `report.html` beside the adapter; `command` is how the run was started, if it was from a shell."""
    write_files(result.output_dir, {NAME: render(result, command).encode()})
    return result.output_dir / NAME


def render(result: TrainResult, command: str | None = None) -> str:
    """The page as text."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("deltatune.report").joinpath("page.html.jinja").read_text("utf-8"))
    metrics, settings = result.metrics, result.settings.resolved()
    before = metrics.get("before", {}).get("eval", {})
    place = adapter_map(result.model)
    return template.render(
        title=f"{settings['method']} on {_base(settings['model_name_or_path'])}",
        metrics=metrics,
        facts=_facts(metrics, settings, place),
        scores=_scores(metrics),
        curves=loss_curves(result.history, before.get("loss")),
        has_eval=any("eval_loss" in entry for entry in result.history) or "loss" in before,
        place=place,
        tone=_tone(place),
        share=share,
        total=total,
        samples=result.samples,
        settings={key: _value(value) for key, value in settings.items() if value not in (None, [], {})},
        command=command,
        repeat=_repeat(result),
        version=_version(),
    )


def total(cells: dict[str, Cell]) -> Cell:
    return Cell(sum(c.parameters for c in cells.values()), sum(c.trained for c in cells.values()))


def _tone(place: AdapterMap) -> Any:
    """Strength of a cell's colour, 0 to 4, by its share of everything that trains."""
    inside = (c.trained for s in place.stacks for row in s.rows.values() for c in row.values())
    most = max(inside, default=0) or max((c.trained for c in place.outside.values()), default=0)

    def tone(cell: Cell) -> int:
        return 0 if not cell.trained else 1 + min(3, round(3 * cell.trained / most)) if most else 1

    return tone


def _facts(metrics: dict[str, Any], settings: dict[str, Any], place: AdapterMap) -> list[tuple[str, str]]:
    machine = f"{metrics['device']}, {plural(metrics['num_threads'], 'thread')}"
    return [
        (
            "trained",
            f"{place.trained:,} of {place.parameters:,} parameters ({share(place.trained, place.parameters)})",
        ),
        ("steps", f"{metrics['steps']:,} ({metrics['epochs']:.3g} epochs of {metrics['train_rows']:,} rows)"),
        *kept(metrics, settings["load_best_model_at_end"]),
        ("time", f"{duration(metrics['train_seconds'])} on {machine}"),
        ("memory", f"{size(metrics['peak_memory_bytes'])} at most"),
        ("learning rate", f"{settings['learning_rate']:g}, {settings['lr_scheduler_type']}"),
        ("seed", str(settings["seed"])),
    ]


def kept(metrics: dict[str, Any], best: bool) -> list[tuple[str, str]]:
    """Whose scores those after training are, where it is not the last step."""
    step = metrics.get("best_step")
    if not best or step in (None, metrics["steps"]):
        return []
    return [("kept", f"step {step}, the best by {metrics['best_metric']} ({metrics['best_score']:.4g})")]


def _scores(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for part in ("eval", "test"):
        before, after = metrics.get("before", {}).get(part, {}), metrics.get("after", {}).get(part, {})
        for name in {**before, **after}:
            old, new = before.get(name), after.get(name)
            better = None
            if old is not None and new is not None and old != new:
                better = (new > old) == (name in RISING)
            rows.append({"name": f"{part} {name.replace('_', ' ')}", "before": old, "after": new, "better": better})
    return rows


def _base(name: str) -> str:
    """A folder by its own name; where it lies is among the settings."""
    return name if is_repository(name) else Path(name).name


def _repeat(result: TrainResult) -> str:
    folder = str(result.output_dir)
    settings = shlex.quote(f"{folder}/settings.json")
    return f"deltatune train {settings} --output_dir {shlex.quote(folder + '-again')}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _version() -> str:
    from importlib.metadata import version

    return version("deltatune")
