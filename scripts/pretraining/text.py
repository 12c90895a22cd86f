"""Public text: passages, prefix continuation and span corruption."""

from __future__ import annotations

import gzip
import lzma
import random
import re
from pathlib import Path

SKIPPED = "<<<"  # the novels' file marks each book by <<<Author_Title_Year>>>


def read_lines(folder: Path) -> list[str]:
    """Every line of prose in the `.txt`, `.txt.gz` and `.txt.xz` files of a folder, whitespace tidied."""
    openers = {".xz": lzma.open, ".gz": gzip.open, ".txt": open}
    lines: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.suffix in openers and ".txt" in path.name:
            with openers[path.suffix](path, "rt", encoding="utf-8") as file:
                lines += [re.sub(r"\s+", " ", line).strip() for line in file if not line.startswith(SKIPPED)]
    return [line.replace("“", '"').replace("”", '"').replace("’", "'") for line in lines if len(line) > 1]


def passages(lines: list[str], characters: int = 400) -> list[str]:
    """Runs of neighbouring lines, each at least `characters` long."""
    found, current = [], ""
    for line in lines:
        current = f"{current} {line}" if current else line
        if len(current) >= characters:
            found.append(current)
            current = ""
    return found


def split_sentences(passage: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?]) (?=[A-Z\"'])", passage) if part]


def window(rng: random.Random, passage: str, words: int) -> list[str]:
    """A run of whole words, beginning at a sentence where one can be found."""
    sentences = split_sentences(passage)
    start = rng.randrange(len(sentences))
    return " ".join(sentences[start:]).split(" ")[:words]


def continuation(rng: random.Random, passage: str) -> tuple[str, str]:
    """Prefix language modelling: read the beginning, write what follows."""
    words = window(rng, passage, rng.randint(24, 44))
    cut = rng.randint(4, max(5, len(words) - 10))
    return "continue: " + " ".join(words[:cut]), " ".join(words[cut:]) or words[-1]


def denoising(rng: random.Random, passage: str) -> tuple[str, str]:
    """T5's span corruption, on words: about a fifth goes, in spans of three."""
    words = window(rng, passage, rng.randint(16, 44))
    source: list[str] = []
    target: list[str] = []
    sentinel, index = 0, 0
    while index < len(words):
        if rng.random() < 0.08 and sentinel < 16:
            span = rng.randint(1, 5)
            source.append(f"<extra_id_{sentinel}>")
            target += [f"<extra_id_{sentinel}>", *words[index : index + span]]
            sentinel += 1
            index += span
        source.append(words[index]) if index < len(words) else None
        index += 1
    if not target:
        source[-1], target = "<extra_id_0>", ["<extra_id_0>", words[-1]]
    return " ".join(source), " ".join(target)


WORD = re.compile(r"^[a-z]{4,}([,.;]?)$")


def refill(rng: random.Random, passage: str, fresh: list[str]) -> tuple[str, str]:
    """A sentence in which words became slots: the input holds the sentence and the values, the output both together."""
    words = window(rng, passage, rng.randint(8, 22))
    places = [index for index, word in enumerate(words) if WORD.match(word)]
    chosen = sorted(rng.sample(places, min(len(fresh), len(places))))
    form, filled, values = list(words), list(words), []
    labels = rng.sample("ABCDEFGH", len(chosen))
    for place, label, value in zip(chosen, labels, fresh, strict=False):
        tail = words[place][-1] if not words[place][-1].isalpha() else ""
        form[place], filled[place] = f"{label}{tail}", f"{value}{tail}"
        values.append(f"{label}: {value}")
    rng.shuffle(values)
    return "fill: " + " ".join(form) + "".join(f" | {value}" for value in values), " ".join(filled)
