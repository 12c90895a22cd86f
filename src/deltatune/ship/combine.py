"""`combine_adapters`: several adapters as one in a folder, and what base, parts and result score on given rows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltatune.errors import ConfigError
from deltatune.generate.load import LABELS, Ready, load_ready
from deltatune.inspect.origin import COMBINATION
from deltatune.model import PeftModel
from deltatune.ship.place import new_folder
from deltatune.ship.recipe import Recipe
from deltatune.ship.scores import FileScores
from deltatune.storage.files import write_files
from deltatune.train.base import quiet
from deltatune.train.result import SETTINGS, as_json

RESULT = "default"  # that name is saved into the folder itself
BASE = "base"


@dataclass(frozen=True)
class Combined:
    """What was written.

    Attributes:
        rank: The highest among its layers; None where it is no LoRA.
        errors: Layer -> share of the combination that the rank could not hold.
        scores: Of "base", each adapter by its folder, and "result"; empty where no data were given.
    """

    folder: Path
    method: str
    rank: int | None
    errors: dict[str, float]
    scores: dict[str, dict[str, float]] = field(default_factory=dict)


def combine_adapters(
    recipe: Recipe,
    out: str | Path,
    *,
    eval_file: str | None = None,
    batch_size: int = 16,
    seed: int = 42,
    command: str | None = None,
) -> Combined:
    """Write a combination of adapters of one base model to a new folder.

    Args:
        recipe: `Recipe((Part("a", 0.7), Part("b", 0.3)), "ties_svd", rank=16)`, or `read_recipe("recipe.yaml")`.
        eval_file: Rows on which base, adapters and result are scored; the result as it is read back from the folder.
        seed: What DARE draws from.
        command: What repeats it, for `inspect`.

    Raises:
        MergeError: They cannot be combined so; `field` names the argument.
        MismatchError: They are for different base models.
        SaveError: `out` is there already.
    """
    with new_folder(out) as folder:
        ready, names = _loaded(recipe)
        model: Any = ready.model
        scored = None if eval_file is None else FileScores.of(ready, eval_file, batch_size)
        scores = {} if scored is None else _before(ready, names, scored)
        errors = model.add_weighted_adapter(
            list(names),
            [part.weight for part in recipe.parts],
            RESULT,
            recipe.type,
            svd_rank=recipe.rank,
            density=_density(recipe),
            majority_sign_method=recipe.sign_method,
            generator=torch.Generator(next(model.parameters()).device).manual_seed(seed),
            consensus=recipe.consensus,
        )
        _write(folder, ready, recipe, command)
        if scored is not None:
            model.load_adapter(folder, "written")
            scores["result"] = _score(model, "written", scored)
        told = {"command": command, "recipe": asdict(recipe), "eval_file": eval_file, "scores": scores}
        write_files(folder, {COMBINATION: as_json(told)})
        config = model.peft_config[RESULT]
    rank = max(config.r, *config.rank_pattern.values(), 0) if hasattr(config, "rank_pattern") else None
    return Combined(Path(out), config.peft_type.value, rank, errors, scores)


def _loaded(recipe: Recipe) -> tuple[Ready, dict[str, str]]:
    """The base with all adapters on it, and their folders by the names they have there."""
    if not recipe.parts:
        raise ConfigError("nothing to combine: give at least one adapter", field="adapters")
    names = _names(part.adapter for part in recipe.parts)
    (first, folder), *others = names.items()
    with quiet():
        ready = load_ready(folder, recipe.base, adapter_name=first)
        if not isinstance(ready.model, PeftModel):
            raise ConfigError(f"{folder} is a model and no adapter", field="adapters", found=folder)
        for name, other in others:
            ready.model.load_adapter(other, name)
    return ready, names


def _names(folders: Iterable[str]) -> dict[str, str]:
    """A name for each folder that an adapter can have, and messages are understood by."""
    found: dict[str, str] = {}
    for folder in folders:
        stem = re.sub(r"\W", "_", Path(folder).resolve().name if Path(folder).exists() else folder)
        name, number = stem, 1
        while name in found or name in (RESULT, "written") or not name:
            number += 1
            name = f"{stem}_{number}"
        found[name] = folder
    return found


def _density(recipe: Recipe) -> list[float] | None:
    shares = [part.density for part in recipe.parts]
    if all(share is None for share in shares):
        return None
    return shares  # type: ignore[return-value]  # one that is missing among others is refused by its value


def _before(ready: Ready, names: dict[str, str], scored: FileScores) -> dict[str, dict[str, float]]:
    scores = {BASE: _score(ready.model, None, scored)}
    return scores | {folder: _score(ready.model, name, scored) for name, folder in names.items()}


def _score(model: Any, name: str | None, scored: FileScores) -> dict[str, float]:
    """With one adapter, or with none."""
    before = model.active_adapters
    try:
        if name is not None:
            model.set_adapter(name, inference_mode=True)
        with model.disable_adapter() if name is None else nullcontext():
            return scored(model)
    finally:
        model.set_adapter(before, inference_mode=True)


def _write(folder: Path, ready: Ready, recipe: Recipe, command: str | None) -> None:
    model: Any = ready.model
    if recipe.dtype is not None:
        _cast(model, getattr(torch, recipe.dtype))
    model.save_pretrained(folder, selected_adapters=[RESULT])
    ready.tokenizer.save_pretrained(folder)
    # how inputs were written in training, and no more: the result comes from no run
    encoder = ready.encoder
    told: dict[str, Any] = {
        "task": ready.task,
        "max_length": encoder.max_length,
        "max_target_length": encoder.max_target_length,
        "separator": encoder.separator,
    }
    files = {SETTINGS: as_json(told)}
    if ready.labels is not None:
        files[LABELS] = as_json({"names": list(ready.labels.names)})
    write_files(folder, files)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if RESULT in name.split("."):
            parameter.data = parameter.data.to(dtype)
