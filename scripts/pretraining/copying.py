"""Copying puzzles: the shortest road to a model that looks at its input."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from . import names
from .words import words

Pair = tuple[str, str]
KEYS = words(
    "name place maker year height colour owner price weight length age shape origin rank code speed depth width style "
    "voice title level month hour patron material mark number guide leader border texture use region sign"
)


def _item(rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.55:
        return names.capital(rng)
    if roll < 0.75:
        return names.word(rng)
    return names.number(rng) if roll < 0.9 else names.code(rng)


def _items(rng: random.Random, most: int) -> list[str]:
    return [_item(rng) for _ in range(rng.randint(1, most))]


def copy(rng: random.Random, most: int) -> Pair:
    line = " ".join(_items(rng, most))
    return f"copy: {line}", line


def reverse(rng: random.Random, most: int) -> Pair:
    items = _items(rng, max(2, most // 2))
    return "reverse: " + " | ".join(items), " | ".join(reversed(items))


def pick(rng: random.Random, most: int) -> Pair:
    """The first, last or n-th of a list."""
    items = _items(rng, most)
    position = rng.randrange(len(items))
    asked = [str(position + 1)]
    asked += ["first"] * (position == 0) + ["last"] * (position == len(items) - 1)
    return f"pick {rng.choice(asked)}: " + " | ".join(items), items[position]


def follow(rng: random.Random, most: int) -> Pair:
    """The word that stands after another word: induction in its purest form."""
    items = [*_items(rng, most + 1), _item(rng)]
    position = rng.randrange(len(items) - 1)
    return f"after {items[position]}: " + " | ".join(items), items[position + 1]


def record(rng: random.Random, most: int) -> tuple[list[str], list[str]]:
    keys = [rng.choice(KEYS) if rng.random() < 0.7 else names.word(rng) for _ in range(rng.randint(1, max(2, most)))]
    keys = list(dict.fromkeys(keys))
    return keys, [names.name(rng) if rng.random() < 0.6 else _item(rng) for _ in keys]


def lookup(rng: random.Random, most: int) -> Pair:
    """The value of a key."""
    keys, values = record(rng, most)
    position = rng.randrange(len(keys))
    listed = " | ".join(f"{key}: {value}" for key, value in zip(keys, values, strict=True))
    return f"get {keys[position]} | {listed}", values[position]


def reorder(rng: random.Random, most: int) -> Pair:
    """The values of several keys in the order asked for."""
    keys, values = record(rng, max(2, most // 2))
    order = rng.sample(range(len(keys)), rng.randint(1, len(keys)))
    listed = " | ".join(f"{key}: {value}" for key, value in zip(keys, values, strict=True))
    return f"get {' , '.join(keys[i] for i in order)} | {listed}", " , ".join(values[i] for i in order)


PUZZLES: Sequence[tuple[float, Callable[[random.Random, int], Pair]]] = (
    (4, copy),
    (1, reverse),
    (1, pick),
    (1, follow),
    (2, lookup),
    (2, reorder),
)


def puzzle(rng: random.Random, most: int = 6) -> Pair:
    """One puzzle over at most `most` items, as (input, output)."""
    weights = [weight for weight, _ in PUZZLES]
    (_, make) = rng.choices(PUZZLES, weights)[0]
    return make(rng, most)


def copied_name(rng: random.Random, held_out: bool) -> Pair:
    """A probe: copy two names."""
    line = " ".join(names.capital(rng, held_out) for _ in range(2))
    return f"copy: {line}", line
