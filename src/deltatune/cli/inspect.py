"""`deltatune inspect`: what an adapter folder or a model folder holds."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.text import Text

from deltatune.cli.failures import FILE
from deltatune.cli.show import console, facts, quiet_libraries, table
from deltatune.config import CONFIG_NAME
from deltatune.errors import FormatError
from deltatune.inspect.adapter import AdapterFacts, pattern
from deltatune.inspect.model import ModelFacts
from deltatune.inspect.origin import Origin
from deltatune.inspect.spectrum import Spectrum
from deltatune.report.words import size


def inspect(folder: str, tensors: bool, as_json: bool) -> None:
    from deltatune.inspect import inspect_adapter

    if _is_model(folder):
        _model(folder, as_json)
        return
    found = inspect_adapter(folder)
    if as_json:
        print(json.dumps(asdict(found), indent=2, default=str))
    else:
        _show(found, tensors)
    if found.problems:
        raise typer.Exit(FILE)


def _is_model(folder: str) -> bool:
    path = Path(folder)
    if path.is_dir():
        return not (path / CONFIG_NAME).is_file() and (path / "config.json").is_file()
    if path.is_file():
        raise FormatError(f"{folder} is a file; give the folder that holds {CONFIG_NAME} or config.json", path=folder)
    return folder == "demo"


def _show(found: AdapterFacts, tensors: bool) -> None:
    out = console()
    base = found.base or "not named"
    if found.base_facts:
        base += f" ({found.base_facts['class']}, {found.base_facts['parameters']:,} parameters)"
    lines: list[tuple[str, Any]] = [
        ("method", found.method),
        ("task", found.task or "none"),
        ("base model", base),
        ("parameters", f"{found.parameters:,} in {len(found.tensors)} tensors, {size(found.file_bytes)}"),
    ]
    if found.virtual_tokens is not None:
        lines.append(("virtual tokens", found.virtual_tokens))
    if found.ranks:
        lines.append(("rank", ", ".join(map(str, found.ranks))))
    lines.append(("written by", "deltatune" if found.base_facts else "another tool (no fingerprint of the base)"))
    out.print(facts(lines))
    out.print()
    out.print(facts((key, json.dumps(value)) for key, value in found.config.items()))
    out.print()
    if tensors:
        rows = [
            (t.name.removesuffix(".weight"), " x ".join(map(str, t.shape)), t.dtype, f"{t.norm:.4g}")
            for t in found.tensors
        ]
        out.print(table(("tensor", "shape", "dtype", "norm"), rows, numbers="lrlr"))
    else:
        rows = [
            (
                group.name.removesuffix(".weight"),
                group.count,
                "; ".join(" x ".join(map(str, shape)) for shape in group.shapes[:3]),
                f"{group.norm_least:.3g}"
                + (f" - {group.norm_most:.3g}" if f"{group.norm_least:.3g}" != f"{group.norm_most:.3g}" else ""),
            )
            for group in found.groups
        ]
        out.print(table(("tensors", "count", "shape", "norm"), rows, numbers="lrrr"))
    out.print()
    if found.spectra:
        _spectra(found.spectra)
    if found.origin is not None:
        _origin(found.origin)
    for problem in found.problems:
        out.print(Text.assemble(("problem", "red"), f": {problem}"), soft_wrap=True)
    if not found.problems:
        out.print("no problems found")


def _spectra(found: list[Spectrum]) -> None:
    """How much of the rank is used, by layers whose paths differ in numbers only."""
    groups: dict[str, list[Spectrum]] = defaultdict(list)
    for layer in sorted(found, key=lambda layer: layer.layer):  # a file has no order of its own
        groups[pattern(f"base_model.model.{layer.layer}")].append(layer)
    columns = ["product B A", "rank", "effective", "for 99 %", "norm"]
    rows = [
        [
            name,
            _span(layer.rank for layer in group),
            _span(round(layer.effective_rank, 1) for layer in group),
            _span(layer.needed for layer in group),
            _span(float(f"{layer.norm:.2g}") for layer in group),
        ]
        for name, group in groups.items()
    ]
    if any(layer.dead for layer in found):  # a column that 80 characters have no room to waste on
        columns.append("dead")
        rows = [[*row, sum(layer.dead for layer in group) or ""] for row, group in zip(rows, groups.values())]
    out = console()
    out.print(table(columns, rows, numbers="lrrrrr"))
    rank, needed = sum(layer.rank for layer in found), sum(layer.needed for layer in found)
    if needed < rank:
        out.print(f"99 % of the change is in {needed} of {rank} directions", highlight=False)
    out.print()


def _span(values: Iterable[float]) -> str:
    found = list(values)
    return f"{min(found):g}" if min(found) == max(found) else f"{min(found):g}-{max(found):g}"


def _origin(found: Origin) -> None:
    lines: list[tuple[str, Any]] = [("repeat", found.command)]
    lines += [(name, value) for name, value in found.data.items()]
    if found.steps is not None:
        lines.append(("trained", f"{found.steps} steps on {found.train_rows} rows in {found.seconds:.0f} s"))
    for when, parts in found.scores.items():
        for part, scores in parts.items():
            told = ", ".join(f"{name} {value:.4g}" for name, value in scores.items() if isinstance(value, float))
            if told:
                lines.append((f"{part}, {when}", told))
    out = console()
    out.print(facts(lines))
    out.print()


def _model(folder: str, as_json: bool) -> None:
    from deltatune.inspect import inspect_model

    quiet_libraries()
    if folder == "demo":
        from deltatune.demo.base import FOLDER

        folder = str(FOLDER)
    found = inspect_model(folder)
    if as_json:
        print(json.dumps(asdict(found), indent=2, default=str))
        return
    out = console()
    out.print(facts([("class", f"{found.class_name} ({found.model_type})"), ("parameters", f"{found.parameters:,}")]))
    out.print()
    rows = [
        (
            layer.name if layer.kind == "Linear" else f"{layer.name} ({layer.kind})",
            " x ".join(map(str, layer.shape)),
            layer.count,
            f"{layer.parameters:,}",
        )
        for layer in found.layers
    ]
    out.print(table(("layers", "weight", "count", "parameters"), rows, numbers="lrrr"))
    out.print()
    usual = [
        (method, json.dumps(value) if value else "none known; name them") for method, value in found.defaults.items()
    ]
    out.print(facts([("usual targets", ""), *usual]))
    out.print()
    _attentions(found)


def _attentions(found: ModelFacts) -> None:
    """How many attentions there are, and how many a prefix reaches, by kind, shape and way."""
    out = console()
    whole = len(found.sites) + sum(not each.partly for each in found.unreached)
    out.print(
        f"attentions: {whole}, of which a prefix reaches {len(found.sites)}" if whole else "attentions: none found"
    )
    if found.sites_note:
        out.print(found.sites_note, soft_wrap=True, markup=False)
    groups: dict[tuple[str, str, str, str], int] = defaultdict(int)
    for site in found.sites:
        heads, dim, value_heads, value_dim = site.shape
        shape = f"{heads} x {dim}" + (f", {value_heads} x {value_dim}" if site.shape[:2] != site.shape[2:] else "")
        groups[pattern(site.name), site.kind, shape, site.way] += 1
    if groups:
        rows = [(name, kind, shape, way, count) for (name, kind, shape, way), count in groups.items()]
        out.print(table(("attention", "kind", "heads x dim", "through", "count"), rows, numbers="llrlr"))
    missed: dict[tuple[str, str, bool], int] = defaultdict(int)
    for each in found.unreached:
        missed[pattern(each.name), each.class_name, each.partly] += 1
    for (name, class_name, partly), count in missed.items():
        what = "in part out of reach" if partly else "out of reach"
        out.print(f"{what}: {count} {class_name} at {name}", soft_wrap=True, markup=False)
