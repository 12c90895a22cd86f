"""Invented names: words that no text holds, with one word in sixteen kept out of training for good."""

from __future__ import annotations

import random
import zlib

from .words import words

ONSETS = words(
    "b c d f g h j k l m n p r s t v w y z b c d f g h j k l m n p r s t v w br bl ch cl cr dr fl fr gl gr kr pl pr "
    "qu sh sk sl sp st str th tr vr wh x zh"
)
NUCLEI = words("a e i o u a e i o u a e i o u a e i o u a e i o y ai au ea ee ei ia ie io oa oo ou ue")
CODAS = [*[""] * 12, *words("b ck d g k l ld ll lt m mp n nd ng nk nt p r rd rk rn rt s sh ss st t th v x z")]
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
HELD_OUT_SHARE = 16


def is_held_out(word: str) -> bool:
    """Whether training never shows this word: a fixed sixteenth of all words, chosen by checksum."""
    return zlib.crc32(word.encode("utf-8")) % HELD_OUT_SHARE == 0


def syllables(rng: random.Random) -> str:
    count = rng.choice((1, 2, 2, 2, 2, 3, 3))
    parts = []
    for index in range(count):
        onset = "" if index == 0 and rng.random() < 0.2 else rng.choice(ONSETS)
        parts.append(
            onset + rng.choice(NUCLEI) + (rng.choice(CODAS) if index == count - 1 or rng.random() < 0.2 else "")
        )
    return "".join(parts)


def word(rng: random.Random, held_out: bool = False) -> str:
    """One invented word in lower case, from the training side or from the held-out side."""
    while True:
        made = syllables(rng)
        if len(made) >= 3 and is_held_out(made) == held_out:
            return made


def capital(rng: random.Random, held_out: bool = False) -> str:
    """One invented name: `Trovane`."""
    return word(rng, held_out).capitalize()


def code(rng: random.Random) -> str:
    """A registration such as `KX-407`."""
    letters = "".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 3)))
    return f"{letters}{rng.choice(('-', ' ', ''))}{rng.randint(1, 10 ** rng.randint(1, 4))}"


def number(rng: random.Random) -> str:
    return str(rng.randint(1, 10 ** rng.randint(1, 4)))


def name(rng: random.Random, held_out: bool = False) -> str:
    """A name of one to three words in one of several shapes."""
    shape = rng.random()
    if shape < 0.45:
        return capital(rng, held_out)
    if shape < 0.8:
        return f"{capital(rng, held_out)} {capital(rng, held_out)}"
    if shape < 0.88:
        return (
            f"{capital(rng, held_out)} {rng.choice(('of', 'van', 'de', 'and', 'ap', 'the'))} {capital(rng, held_out)}"
        )
    if shape < 0.94:
        return f"{capital(rng, held_out)} {capital(rng, held_out)} {capital(rng, held_out)}"
    return f"{capital(rng, held_out)} {code(rng)}"
