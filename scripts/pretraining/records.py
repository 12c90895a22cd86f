"""Records to sentences: many domains, many ways to write a record down, many styles, and forms to fill in."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from . import domains, names

Pair = tuple[str, str]
Slot = tuple[str, str, str, str]  # key, value, predicate, phrase


def _slots(rng: random.Random, held_out: bool) -> list[Slot]:
    slots: dict[str, Slot] = {}
    for _ in range(rng.choice((1, 2, 2, 3, 3, 3, 4))):
        key, value_of, predicates, phrases = domains.attribute(rng)
        value = value_of(rng, held_out)
        slots[key] = (
            key,
            value,
            rng.choice(predicates).replace("{v}", value),
            rng.choice(phrases).replace("{v}", value),
        )
    return list(slots.values())


def _and(parts: Sequence[str], last: str = " and ") -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + last + parts[-1]


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


Style = Callable[[str, str, list[Slot]], str]


def plain(name: str, kind: str, slots: list[Slot]) -> str:
    return f"{name} is {_a(kind)} that {_and([slot[2] for slot in slots])}."


def separate(name: str, kind: str, slots: list[Slot]) -> str:
    return f"{name} is {_a(kind)}. " + " ".join(f"It {slot[2]}." for slot in slots)


def titled(name: str, kind: str, slots: list[Slot]) -> str:
    return f"The {kind} {name} {_and([slot[2] for slot in slots])}."


def called(name: str, kind: str, slots: list[Slot]) -> str:
    return f"There is {_a(kind)} called {name}; " + "; ".join(f"it {slot[2]}" for slot in slots) + "."


def question(name: str, kind: str, slots: list[Slot]) -> str:
    return f"Do you know {name}? This {kind} {_and([slot[2] for slot in slots])}."


def telegram(name: str, kind: str, slots: list[Slot]) -> str:
    return f"{kind.upper() if len(kind) < 5 else _upper(kind)} {name}: " + ", ".join(slot[3] for slot in slots) + "."


def phrase_first(name: str, kind: str, slots: list[Slot]) -> str:
    return f"{_upper(_and([slot[3] for slot in slots]))}: that is {name}, {_a(kind)}."


def apposition(name: str, kind: str, slots: list[Slot]) -> str:
    rest = "".join(f", {slot[3]}" for slot in slots[1:])
    return f"{name}, {_a(kind)}{rest}, {slots[0][2]}."


def gossip(name: str, kind: str, slots: list[Slot]) -> str:
    return f"They say that {_a(kind)} named {name} {_and([slot[2] for slot in slots], ' and even ')}!"


def backwards(name: str, kind: str, slots: list[Slot]) -> str:
    return f"{_and([_upper(slots[0][3]), *(slot[3] for slot in slots[1:])])}, the {kind} {name} waits."


def letter(name: str, kind: str, slots: list[Slot]) -> str:
    return f"Dear friend, today I saw {name}, the {kind}; it {_and([slot[2] for slot in slots])}. Yours truly."


def values_only(name: str, kind: str, slots: list[Slot]) -> str:
    return f"{name} ({kind}) " + " / ".join(slot[1] for slot in slots)


def keyed(name: str, kind: str, slots: list[Slot]) -> str:
    return f"For the {kind} {name}, " + _and([f"the {slot[0]} is {slot[1]}" for slot in slots]) + "."


def whose(name: str, kind: str, slots: list[Slot]) -> str:
    return f"I mean {name}, the {kind} whose " + _and([f"{slot[0]} is {slot[1]}" for slot in slots]) + "."


STYLES: dict[str, Style] = {
    style.__name__.replace("_", " "): style
    for style in (
        plain, separate, titled, called, question, telegram, phrase_first, apposition, gossip, backwards, letter,
        values_only, keyed, whose,
    )
}  # fmt: skip


def write_record(rng: random.Random, fields: list[tuple[str, str]]) -> str:
    """A record as a line, in one of several notations."""
    roll = rng.random()
    if roll < 0.7:
        return " | ".join(f"{key}: {value}" for key, value in fields)
    if roll < 0.8:
        return " ; ".join(f"{key} = {value}" for key, value in fields)
    if roll < 0.9:
        return ", ".join(f"{key} [ {value} ]" for key, value in fields)
    return " | ".join(f"{value} ( {key} )" for key, value in fields)


def described(rng: random.Random, held_out: bool) -> Pair:
    """A record of an invented thing, and a sentence in a style that the input names, or leaves open."""
    name, kind, slots = names.name(rng, held_out), domains.kind(rng), _slots(rng, held_out)
    label, style = rng.choice(list(STYLES.items()))
    fields = [("name", name), ("kind", kind)]
    middle = [(slot[0], slot[1]) for slot in slots]
    if rng.random() < 0.4:  # the order of the input is not always the order of the sentence
        fields += middle
        rng.shuffle(fields)
    else:
        fields += middle
    head = f"style: {label} | " if rng.random() < 0.6 else ""
    return head + write_record(rng, fields), style(name, kind, slots)


def form(rng: random.Random, held_out: bool) -> Pair:
    """The same, with the sentence given as a form whose slots are the keys: a style that no one has seen before."""
    name, kind, slots = names.name(rng, held_out), domains.kind(rng), _slots(rng, held_out)
    style = rng.choice(list(STYLES.values()))
    labels = ["NAME", "KIND", *(slot[0].upper() for slot in slots)]
    marked = [
        (key, value, predicate.replace(value, key.upper()), phrase.replace(value, key.upper()))
        for key, value, predicate, phrase in slots
    ]
    blanks = [(key, key.upper(), predicate, phrase) for key, _, predicate, phrase in marked]
    fields = list(zip(labels, [name, kind, *(slot[1] for slot in slots)], strict=True))
    rng.shuffle(fields)
    listed = " | ".join(f"{label}: {value}" for label, value in fields)
    return f"fill: {style('NAME', 'KIND', blanks)} | {listed}", style(name, kind, slots)


def pair(rng: random.Random, held_out: bool = False) -> Pair:
    """A record and its sentence."""
    return form(rng, held_out) if rng.random() < 0.2 else described(rng, held_out)
