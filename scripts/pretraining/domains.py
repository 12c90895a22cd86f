"""Invented domains: kinds of things, their attributes and the ways to say them.

Beekeeping is left out: it belongs to the demo task, which the base must not have seen. So are restaurants, so that a
benchmark on restaurant records tests transfer as well.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from . import names
from .words import words

KINDS = words("""lighthouse bridge castle telescope violin ship train island mountain river painter poet singer doctor
museum library school garden factory theatre stadium market road tunnel tower church clock camera piano drum novel
film song statue painting map robot rocket satellite planet star comet horse dog wolf eagle whale tree flower
mushroom stone crystal sword shield crown ring coat hat shoe chair table lamp carpet bicycle lorry aeroplane balloon
canal harbour mine farm mill bakery workshop laboratory office village city province kingdom desert forest lake
glacier volcano cave beach team club league game puzzle recipe cheese soup cake medicine engine battery computer
program language alphabet festival parade treaty battle voyage expedition court prison bank company union newspaper
magazine letter radio channel teacher soldier sailor pilot judge mayor baker weaver smith hunter guide""")

COLOURS = words("red blue green black white grey yellow purple brown silver golden orange pink dark pale")
MATERIALS = words("wood stone iron glass brass clay silk wool copper paper bone marble steel leather tin oak slate")
MONTHS = words(
    "January February March April May June July August September October November December spring summer autumn winter"
)
MOODS = words(
    "quiet famous old young strange small large narrow fast slow heavy light rare common cheap costly warm cold"
)
UNITS = words("metres feet miles tons pounds days hours years coins people rooms")

PLACE_WORDS = ("North", "Old", "Upper", "Port", "Mount")

Value = Callable[[random.Random, bool], str]


def _name(rng: random.Random, held_out: bool) -> str:
    return names.name(rng, held_out)


def _place(rng: random.Random, held_out: bool) -> str:
    before = rng.choice(("", "", "", *PLACE_WORDS))
    return (f"{before} " if before else "") + names.capital(rng, held_out)


def _year(rng: random.Random, held_out: bool) -> str:
    return str(rng.randint(1000, 2099))


def _amount(rng: random.Random, held_out: bool) -> str:
    return f"{rng.randint(2, 10 ** rng.randint(1, 4))} {rng.choice(UNITS)}"


def _number(rng: random.Random, held_out: bool) -> str:
    return names.number(rng)


def _code(rng: random.Random, held_out: bool) -> str:
    return names.code(rng)


def _word(rng: random.Random, held_out: bool) -> str:
    return names.word(rng, held_out)


def _of(choices: list[str]) -> Value:
    return lambda rng, held_out: rng.choice(choices)


# key, values, predicates ("{n} <predicate>"), phrases (set off by commas)
Attribute = tuple[str, Value, tuple[str, ...], tuple[str, ...]]
ATTRIBUTES: tuple[Attribute, ...] = (
    (
        "place",
        _place,
        ("stands in {v}", "lies near {v}", "can be found in {v}", "belongs to {v}"),
        ("in {v}", "near {v}"),
    ),
    ("origin", _place, ("comes from {v}", "was born in {v}", "began in {v}"), ("from {v}", "out of {v}")),
    ("maker", _name, ("was made by {v}", "is the work of {v}", "was built by {v}"), ("made by {v}", "a work of {v}")),
    (
        "owner",
        _name,
        ("is owned by {v}", "belongs to {v}", "is in the hands of {v}"),
        ("owned by {v}", "property of {v}"),
    ),
    ("leader", _name, ("is led by {v}", "follows {v}", "answers to {v}"), ("led by {v}", "under {v}")),
    ("guide", _name, ("is shown by {v}", "has {v} as a guide"), ("with {v} as guide", "guided by {v}")),
    ("rival", _name, ("fears {v}", "competes with {v}", "was beaten by {v}"), ("rival of {v}", "against {v}")),
    ("friend", _name, ("is a friend of {v}", "travels with {v}"), ("friend of {v}", "together with {v}")),
    ("year", _year, ("dates from {v}", "was finished in {v}", "has been known since {v}"), ("since {v}", "of {v}")),
    ("opened", _year, ("opened in {v}", "was opened in {v}"), ("opened in {v}", "open since {v}")),
    ("month", _of(MONTHS), ("is best seen in {v}", "returns every {v}", "closes in {v}"), ("in {v}", "every {v}")),
    ("colour", _of(COLOURS), ("is {v}", "is painted {v}", "looks {v}"), ("{v} in colour", "all {v}")),
    ("material", _of(MATERIALS), ("is made of {v}", "consists of {v}"), ("of {v}", "made of {v}")),
    ("height", _amount, ("is {v} high", "rises {v}", "measures {v}"), ("{v} high", "at a height of {v}")),
    ("length", _amount, ("is {v} long", "stretches over {v}"), ("{v} long", "over {v}")),
    ("price", _amount, ("costs {v}", "is sold for {v}"), ("for {v}", "at {v}")),
    ("weight", _amount, ("weighs {v}", "has a weight of {v}"), ("weighing {v}", "{v} in weight")),
    ("number", _number, ("has the number {v}", "is number {v}"), ("number {v}", "no. {v}")),
    ("code", _code, ("is filed under {v}", "carries the mark {v}"), ("marked {v}", "code {v}")),
    ("rank", _number, ("ranks at {v}", "takes place {v}"), ("at rank {v}", "rank {v}")),
    ("nature", _of(MOODS), ("is rather {v}", "is {v}", "is known to be {v}"), ("quite {v}", "{v} by nature")),
    ("language", _name, ("speaks {v}", "uses the language {v}"), ("in {v}", "speaking {v}")),
    ("motto", _word, ("says {v}", "has the motto {v}"), ("true to {v}", "motto {v}")),
    (
        "prize",
        _name,
        ("won the {v} prize", "was given the {v} medal"),
        ("winner of the {v} prize", "with the {v} medal"),
    ),
)
GENERIC = ("has {v} as its {k}", "has the {k} {v}", "is of the {k} {v}", "shows {v} for {k}", "keeps {v} as {k}")
GENERIC_PHRASES = ("with the {k} {v}", "{k} {v}", "its {k} being {v}")
NOUNS = words("""
signal pattern handle crew crest anthem season motive badge wheel engine patron border column texture chorus
sponsor voice captain grade habit sister brother window roof gate echo stamp banner cargo tutor dialect emblem quarry
ritual budget rhythm target station sector partner garment author editor series volume chapter branch root climate
""")


def attribute(rng: random.Random) -> Attribute:
    """One of the known attributes, or one with a key picked or invented for the moment."""
    if rng.random() < 0.6:
        return rng.choice(ATTRIBUTES)
    key = rng.choice(NOUNS) if rng.random() < 0.6 else names.word(rng)
    value = rng.choice((_name, _name, _place, _word, _number, _year, _code, _of(COLOURS), _of(MATERIALS)))
    predicates = tuple(form.replace("{k}", key) for form in GENERIC)
    return key, value, predicates, tuple(form.replace("{k}", key) for form in GENERIC_PHRASES)


def kind(rng: random.Random) -> str:
    """What the thing is: a known kind, or a made-up one."""
    return rng.choice(KINDS) if rng.random() < 0.85 else names.word(rng)
