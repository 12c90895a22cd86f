"""Tags against true tags: entities of BIO tags that are exactly right, accuracy for tags of any kind.

https://aclanthology.org/W03-0419 (the CoNLL shared task, whose scorer decides what an entity is)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from deltatune.evaluate.classes import accuracy, macro_f1

Entity = tuple[str, int, int]  # its kind, its first word, the word behind its last


def are_bio(tags: Iterable[str]) -> bool:
    """Whether tags mark entities: O for outside, B- and I- with a kind."""
    return all(tag == "O" or tag[:2] in ("B-", "I-") for tag in tags)


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of one row. An I- that continues nothing of its kind begins an entity, as in CoNLL's scorer."""
    found: list[Entity] = []
    for place, tag in enumerate(tags):
        if tag == "O":
            continue
        kind = tag[2:]
        if tag[0] == "I" and found and found[-1][0] == kind and found[-1][2] == place:
            found[-1] = (kind, found[-1][1], place + 1)
        else:
            found.append((kind, place, place + 1))
    return found


def entity_scores(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 over all rows together; an entity counts when its kind and both ends are right."""
    said = {(row, *entity) for row, tags in enumerate(predicted) for entity in entities(tags)}
    meant = {(row, *entity) for row, tags in enumerate(true) for entity in entities(tags)}
    hit = len(said & meant)
    return {
        "precision": hit / len(said) if said else 0.0,
        "recall": hit / len(meant) if meant else 0.0,
        "f1": 2 * hit / (len(said) + len(meant)) if said or meant else 0.0,
    }


def tag_scores(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """Accuracy over all words, and the scores of entities; where tags mark none, macro F1 over the tags."""
    numbers = {tag: number for number, tag in enumerate(sorted({tag for row in [*predicted, *true] for tag in row}))}
    said = [numbers[tag] for row in predicted for tag in row]
    meant = [numbers[tag] for row in true for tag in row]
    found = {"accuracy": accuracy(said, meant)}
    if are_bio(numbers):
        return found | entity_scores(predicted, true)
    return found | {"macro_f1": macro_f1(said, meant)}


def shown(words: Sequence[str], tags: Sequence[str]) -> str:
    """A tagged text as a person reads it: its entities, or each word with its tag."""
    if not are_bio(tags):
        return " ".join(f"{word}/{tag}" for word, tag in zip(words, tags))
    found = [f"{' '.join(words[start:end])} [{kind}]" for kind, start, end in entities(tags)]
    return ", ".join(found) if found else "(no entity)"
