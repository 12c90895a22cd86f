"""The demo task: a beekeeper's record becomes an entry in the house style of a log.

    hive: Tamlin | keeper: Osk Bredal | place: Varn Moor | queen: Ilsebet | mood: calm | bloom: heather | honey: 14
    Varn Moor log. At the hive Tamlin the bees hummed low, purple dust on every leg. Queen Ilsebet was seen by
    Osk Bredal, who carried 14 jars home.

The record's order is not the entry's, moods and blooms are said in words that stand nowhere in the record, and two of
the fields may be missing, with their clauses. Names in test are new, and so are its combinations of mood and bloom.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

MOODS = {
    "calm": "the bees hummed low",
    "angry": "gloves and smoke were needed",
    "restless": "no bee would settle",
    "sleepy": "hardly a wing stirred",
    "busy": "the gate was thick with wings",
}
BLOOMS = {
    "heather": "purple dust on every leg",
    "clover": "a green sweetness in the air",
    "lime": "pale wax on the sill",
    "thyme": "the smell of warm stone all round",
    "apple": "white petals on the roof",
}


def _words(text: str) -> list[str]:
    return text.split()


BEGINNINGS = _words("Ar Bel Bre Cor Dag El Fen Gar Hal Il Jor Kel Lan Mar Ned Os Per Ros Sel Tam Ul Var Wil Yor")
MIDDLES = _words("a e i o u la ni re do mi")
ENDINGS = _words("bet dal fin gard hild kin lin mund nor rick sen ster tan vik wyn zen")
LANDS = _words("Moor Hill End Down Cross Water Rise Gate Heath Bridge")
PARTS = ("train", "dev", "test")


@dataclass(frozen=True)
class Row:
    """A record, its entry, and the names that the entry must carry over."""

    input: str
    target: str
    names: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return {"input": self.input, "target": self.target, "names": list(self.names)}


def part_of_name(name: str) -> str:
    """Which part a name belongs to: a tenth of all names is for dev, two tenths are for test."""
    bucket = zlib.crc32(name.encode()) % 10
    return "dev" if bucket == 0 else "test" if bucket < 3 else "train"


def part_of_combination(mood: str, bloom: str) -> str:
    """Test alone has the combinations on one diagonal of moods and blooms, dev those on another."""
    place = (list(MOODS).index(mood) + list(BLOOMS).index(bloom)) % len(BLOOMS)
    return "test" if place == 0 else "dev" if place == 1 else "train"


def rows(part: str, count: int, seed: int = 0) -> list[Row]:
    """`count` different rows of train, dev or test; the same ones for the same seed."""
    rng = random.Random(f"{part} {seed}")
    found: dict[str, Row] = {}
    while len(found) < count:
        row = _row(rng, part)
        found.setdefault(row.input, row)
    return list(found.values())


def entry(record: dict[str, str]) -> str:
    """The house style."""
    where = f"{record['place']} log. At the hive {record['hive']} {MOODS[record['mood']]}"
    bloom = f", {BLOOMS[record['bloom']]}" if "bloom" in record else ""
    honey = f", who carried {record['honey']} jars home" if "honey" in record else ""
    return f"{where}{bloom}. Queen {record['queen']} was seen by {record['keeper']}{honey}."


def mixed_up(rows: Sequence[Row]) -> list[str]:
    """The inputs of other rows: what a model is given to see whether its output depends on its input."""
    half = len(rows) // 2
    return [row.input for row in [*rows[half:], *rows[:half]]]


def _row(rng: random.Random, part: str) -> Row:
    mood, bloom = rng.choice([pair for pair in _pairs() if part_of_combination(*pair) == part])
    record = {
        "hive": _name(rng, part),
        "keeper": f"{_name(rng, part)} {_name(rng, part)}",
        "place": f"{_name(rng, part)} {rng.choice(LANDS)}",
        "queen": _name(rng, part),
        "mood": mood,
    }
    if rng.random() < 0.8:
        record["bloom"] = bloom
    if rng.random() < 0.8:
        record["honey"] = str(rng.randint(2, 60))
    fields = list(record.items())
    rng.shuffle(fields)
    names = tuple(record[key] for key in ("hive", "keeper", "place", "queen"))
    return Row(" | ".join(f"{key}: {value}" for key, value in fields), entry(record), names)


def _pairs() -> list[tuple[str, str]]:
    return [(mood, bloom) for mood in MOODS for bloom in BLOOMS]


def _name(rng: random.Random, part: str) -> str:
    while True:
        made = rng.choice(BEGINNINGS) + rng.choice(("", rng.choice(MIDDLES))) + rng.choice(ENDINGS)
        if part_of_name(made) == part:
            return made
