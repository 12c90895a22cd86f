"""Checks of config values: the type of a field against its annotation, and the ranges that many methods share."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from deltatune.errors import ConfigError

LARGEST = 3.4028234663852886e38


def fits(value: Any, annotation: Any) -> bool:
    """Whether `value` may stand where `annotation` is declared; a bool is not an int, an int is a float."""
    origin = typing.get_origin(annotation)
    if annotation is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    if origin in (list, set, tuple):
        item = typing.get_args(annotation)[0] if typing.get_args(annotation) else Any
        return isinstance(value, (list, set, tuple, frozenset)) and all(fits(part, item) for part in value)
    if origin is dict or annotation is dict:
        return isinstance(value, Mapping)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def representable(owner: str, field: str, value: Any) -> None:
    """Numbers go into tensors: an integer has 64 bits there, a finite one at most float32's largest."""
    if isinstance(value, int) and abs(value) >= 2**63:
        refuse(owner, field, value, "an integer of 64 bits")
    if isinstance(value, float) and math.isfinite(value) and abs(value) > LARGEST:
        refuse(owner, field, value, f"a number of at most {LARGEST:.3g}, float32's largest")


def as_set(value: Any) -> Any:
    """A list of names as a set; anything else as it is, to be refused by `validate`."""
    listed = isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value)
    return set(value) if listed else value


def describe(annotation: Any) -> str:
    """An annotation as a user would say it: `int`, `list[str] | str | None`."""
    return getattr(annotation, "__name__", None) or str(annotation).replace("typing.", "")


def refuse(owner: str, field: str, value: Any, expected: str) -> typing.NoReturn:
    raise ConfigError(
        f"{owner}: {field}={shown(value)} is not allowed, expected {expected}",
        field=field,
        found=value,
        expected=expected,
    )


def instance(field: str, value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    """Refuse an argument of a verb that is no such object, before anything is asked of it."""
    if not isinstance(value, kind):
        what = f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"
        raise ConfigError(
            f"{field} is {'None' if value is None else what}, expected {expected}",
            field=field,
            found=value,
            expected=expected,
        )


def shown(value: Any) -> str:
    """A value in a message: a file could give one of any length."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def positive_int(owner: str, field: str, value: Any) -> None:
    if not fits(value, int) or value < 1:
        refuse(owner, field, value, "an integer of 1 or more")


def finite_positive(owner: str, field: str, value: Any) -> None:
    if not fits(value, float) or not math.isfinite(value) or value <= 0:
        refuse(owner, field, value, "a finite number above 0")


def probability(owner: str, field: str, value: Any) -> None:
    if not fits(value, float) or not 0 <= value < 1:  # NaN fails the comparison
        refuse(owner, field, value, "a probability in [0, 1)")


def one_of(owner: str, field: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value is option or (type(value) is type(option) and value == option) for option in allowed):
        refuse(owner, field, value, "one of " + ", ".join(repr(option) for option in allowed))


def at_most(owner: str, field: str, value: int, limit: int, what: str) -> None:
    """Refuse what does not fit a layer, with the largest value that does."""
    if value > limit:
        refuse(owner, field, value, f"at most {limit}, {what}")


def divisor(owner: str, field: str, value: int, number: int, what: str, path: str, hint: str = "") -> None:
    """Refuse what does not divide `number`, a size of the layer at `path`, with the nearest value that does."""
    if number % value:
        near = min((n for n in range(1, number + 1) if number % n == 0), key=lambda n: abs(n - value))
        raise ConfigError(
            f"{owner}: {field}={value} does not divide {what}; the nearest value that does is {near}{hint}",
            field=field,
            path=path,
            found=value,
            expected=near,
        )


def seed(owner: str, field: str, value: Any) -> None:
    if not fits(value, int) or not -(2**63) <= value < 2**64:
        refuse(owner, field, value, "an integer of 64 bits")
