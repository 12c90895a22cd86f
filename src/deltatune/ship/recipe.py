"""Which adapters are combined and how: from words (`my-adapter=0.7`) or from a YAML file as mergekit has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from deltatune.errors import ConfigError, FormatError
from deltatune.suggest import did_you_mean

DTYPES = ("float32", "bfloat16", "float16")
KEYS = ("merge_method", "models", "base_model", "dtype", "parameters")
OPTIONS = ("weight", "density", "normalize", "rescale", "int8_mask")


@dataclass(frozen=True)
class Part:
    """One adapter: its folder, what it weighs, the share of it that pruning keeps."""

    adapter: str
    weight: float = 1.0
    density: float | None = None


@dataclass(frozen=True)
class Recipe:
    """A combination.

    Attributes:
        type: As in `add_weighted_adapter`.
        rank: Of the result; None: the sum of the ranks for exact sums, the highest for the others.
        base: The base model; None: the one that the first adapter names.
        dtype: Of the tensors in the file; None: as they come out.
    """

    parts: tuple[Part, ...]
    type: str = "linear"
    rank: int | None = None
    sign_method: str = "total"
    consensus: str = "mean"
    base: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise _wrong("dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        if self.rank is not None and self.type in ("linear", "cat"):
            object.__setattr__(self, "type", "svd")  # the nearest to the sum of that rank


def parts_of(words: Sequence[str], density: float | None = None) -> tuple[Part, ...]:
    """`folder=0.7`, or `folder` for a weight of one."""
    parts = []
    for word in words:
        folder, equals, text = word.rpartition("=")
        if not equals or Path(word).exists():
            parts.append(Part(word, 1.0, density))
            continue
        try:
            parts.append(Part(folder, float(text), density))
        except ValueError:
            raise _wrong("weight", text, f"a number behind {folder}=") from None
    return tuple(parts)


def read_recipe(path: str | Path) -> Recipe:
    """The recipe of a YAML file with mergekit's keys, and the meaning that they have there.

    Raises:
        FormatError: It cannot be read.
        ConfigError: It asks for what adapters cannot do, by key.
    """
    try:
        held = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"recipe {path} cannot be read: {error.strerror}", path=str(path)) from error
    except yaml.YAMLError as error:
        raise FormatError(f"recipe {path} is malformed: {' '.join(str(error).split())}", path=str(path)) from error
    if not isinstance(held, dict):
        raise FormatError(f"recipe {path} holds no names with values", path=str(path))
    _check_keys(held, KEYS, "recipe")
    method, base = held.get("merge_method"), held.get("base_model")
    if method not in _METHODS:
        hint = did_you_mean(str(method), list(_METHODS))
        raise _wrong("merge_method", method, f"one of {', '.join(_METHODS)}{hint}")
    models = held.get("models")
    if not isinstance(models, list) or not models:
        raise _wrong("models", models, "a list of {model, parameters}")
    shared = _options(held.get("parameters"), "parameters")
    parts, of_base = [], 0.0
    for entry in models:
        if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
            raise _wrong("models", entry, "an adapter folder as model, with its parameters")
        _check_keys(entry, ("model", "parameters"), "models")
        own = {**shared, **_options(entry.get("parameters"), entry["model"])}
        if entry["model"] == base:
            of_base += _number(own.get("weight", 0.0), "weight")
        else:
            parts.append(_part(entry["model"], base, own))
    if not parts:
        raise _wrong("models", [entry["model"] for entry in models], "at least one adapter beside the base")
    options = {"base": None if base is None else str(base), "dtype": held.get("dtype")}
    return _METHODS[method](Recipe(tuple(parts), **options), shared, of_base)


def _linear(recipe: Recipe, shared: dict[str, Any], of_base: float) -> Recipe:
    """A mean of models: the changes weighted by shares of the whole, in which the base may have one."""
    whole = sum(part.weight for part in recipe.parts) + of_base
    if _flag(shared, "normalize", True):
        return _divided(recipe, whole)
    if abs(whole - 1) > 1e-6:
        raise _wrong("normalize", False, f"true where weights sum to {whole:g}: an adapter cannot scale its base")
    return recipe


def _arithmetic(recipe: Recipe, shared: dict[str, Any], of_base: float) -> Recipe:
    whole = sum(part.weight for part in recipe.parts)
    return _divided(recipe, whole) if _flag(shared, "normalize", False) else recipe


def _dare_linear(recipe: Recipe, shared: dict[str, Any], of_base: float) -> Recipe:
    if not _flag(shared, "rescale", True):
        raise _wrong("rescale", False, "true with dare_linear and dare_ties: what is left is divided by the density")
    return replace(_arithmetic(_dense(recipe), shared, of_base), type="dare_linear_svd")


def _ties(recipe: Recipe, shared: dict[str, Any], of_base: float) -> Recipe:
    if _flag(shared, "rescale", False):
        raise _wrong("rescale", True, "false with ties")
    consensus = "weighted_mean" if _flag(shared, "normalize", True) else "sum"
    return replace(_dense(recipe), type="ties_svd", consensus=consensus)


def _dare_ties(recipe: Recipe, shared: dict[str, Any], of_base: float) -> Recipe:
    consensus = "weighted_mean" if _flag(shared, "normalize", False) else "sum"
    return replace(
        _dare_linear(recipe, {**shared, "normalize": False}, of_base), type="dare_ties_svd", consensus=consensus
    )


_METHODS = {
    "linear": _linear,
    "task_arithmetic": _arithmetic,
    "ties": _ties,
    "dare_linear": _dare_linear,
    "dare_ties": _dare_ties,
}


def _part(model: str, base: Any, own: dict[str, Any]) -> Part:
    """`base+adapter` is mergekit's way to name an adapter."""
    before, plus, adapter = model.partition("+")
    if not plus or Path(model).exists():
        adapter = model
    elif base is not None and before != base:
        raise _wrong("model", model, f"an adapter of base_model {base}")
    if "weight" not in own:
        raise _wrong("weight", None, f"a number among the parameters of {model}")
    density = own.get("density")
    return Part(adapter, _number(own["weight"], "weight"), None if density is None else _number(density, "density"))


def _dense(recipe: Recipe) -> Recipe:
    """Without a density everything is kept."""
    return replace(
        recipe, parts=tuple(replace(p, density=1.0 if p.density is None else p.density) for p in recipe.parts)
    )


def _divided(recipe: Recipe, whole: float) -> Recipe:
    if abs(whole) < 1e-8:
        raise _wrong("normalize", True, "false where the weights sum to nothing")
    return replace(recipe, parts=tuple(replace(part, weight=part.weight / whole) for part in recipe.parts))


def _options(held: Any, place: str) -> dict[str, Any]:
    if held is None:
        return {}
    if not isinstance(held, dict):
        raise _wrong("parameters", held, "names with values")
    _check_keys(held, OPTIONS, place)
    return held


def _check_keys(held: dict[str, Any], known: Sequence[str], place: str) -> None:
    for key in held:
        if key not in known:
            raise ConfigError(
                f"{place}: {key!r} is not known here{did_you_mean(str(key), list(known))}; for adapters there are "
                f"{', '.join(known)}",
                field=str(key),
                found=held[key],
                expected=list(known),
            )


def _flag(shared: dict[str, Any], name: str, default: bool) -> bool:
    value = shared.get(name, default)
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(name, value, "one number (values that differ by layer are not for adapters)")
    return float(value)


def _wrong(field: str, found: Any, expected: str) -> ConfigError:
    return ConfigError(f"{field}={found!r} is not allowed, expected {expected}", field=field, found=found)
