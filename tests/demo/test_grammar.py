"""The demo task: reproducible, with a test that training did not show."""

import re

import pytest

from deltatune.demo import grammar


def record(row):
    return dict(field.split(": ") for field in row.input.split(" | "))


@pytest.fixture(scope="module")
def parts():
    return {part: grammar.rows(part, 300) for part in grammar.PARTS}


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    assert grammar.rows("train", 20, seed=3) == grammar.rows("train", 20, seed=3)
    assert grammar.rows("train", 20, seed=3) != grammar.rows("train", 20, seed=4)


def test_no_input_comes_twice(parts):
    for rows in parts.values():
        assert len({row.input for row in rows}) == len(rows)


def test_no_name_of_a_part_stands_in_another(parts):
    words = {
        part: {word for row in rows for name in row.names for word in name.split()} for part, rows in parts.items()
    }
    lands = set(grammar.LANDS)
    for part in grammar.PARTS:
        for other in set(grammar.PARTS) - {part}:
            assert not (words[part] & words[other]) - lands


def test_combinations_of_mood_and_bloom_are_new_in_test(parts):
    seen = {
        part: {(found["mood"], found["bloom"]) for row in rows if "bloom" in (found := record(row))}
        for part, rows in parts.items()
    }
    assert seen["train"] and not seen["train"] & seen["test"] and not seen["train"] & seen["dev"]
    assert {mood for mood, _ in seen["train"]} == set(grammar.MOODS)
    assert {bloom for _, bloom in seen["train"]} == set(grammar.BLOOMS)


def test_an_entry_says_every_field_of_its_record(parts):
    for row in parts["test"]:
        found = record(row)
        assert all(name in row.target for name in row.names)
        assert grammar.MOODS[found["mood"]] in row.target
        assert ("bloom" in found) == any(phrase in row.target for phrase in grammar.BLOOMS.values())
        assert ("honey" in found) == ("jars" in row.target)
        assert row.target == grammar.entry(found)


def test_mixed_up_inputs_belong_to_other_rows(parts):
    rows = parts["dev"]
    assert all(text != row.input for text, row in zip(grammar.mixed_up(rows), rows, strict=True))


def test_pretraining_knows_nothing_of_the_domain():
    from scripts.pretraining import domains

    words = {*domains.KINDS, *domains.NOUNS, *(key for key, *_ in domains.ATTRIBUTES)}
    forms = " ".join(form for _, _, predicates, phrases in domains.ATTRIBUTES for form in (*predicates, *phrases))
    words |= set(re.findall(r"[a-z]+", forms))
    assert len(words) > 150
    assert not words & {"hive", "hives", "bee", "bees", "honey", "queen", "keeper", "bloom", "mood", "jars", "log"}
