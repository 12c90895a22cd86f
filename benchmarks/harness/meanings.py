"""E2E NLG by meaning representation: a record of slots, all its reference texts, and scores over such records.

https://aclanthology.org/W17-5525
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deltatune.evaluate import bleu, bracketed_slots, present_share, rouge_l, swapped, swapped_score
from harness.data import Row

# Its values are yes and no: nobody writes them down, human references least of all.
NOT_VERBATIM = {"familyFriendly"}


@dataclass(frozen=True)
class Meaning:
    """One record and all texts that say it."""

    record: str
    references: tuple[str, ...]

    @property
    def values(self) -> list[str]:
        """The slot values that a text is expected to repeat word for word."""
        return [value for slot, value in bracketed_slots(self.record).items() if slot not in NOT_VERBATIM]


def group(rows: Iterable[Row]) -> list[Meaning]:
    """Every record once, in order of first appearance, with all its references."""
    texts: dict[str, list[str]] = {}
    for row in rows:
        texts.setdefault(row["mr"], []).append(row["ref"])
    return [Meaning(record, tuple(references)) for record, references in texts.items()]


def linearised(record: str) -> str:
    """`name[Blue Spice], eatType[pub]` as `name: Blue Spice | eat type: pub`: as in the prefix-tuning paper."""
    pairs = bracketed_slots(record).items()
    return " | ".join(f"{re.sub('([a-z])([A-Z])', _apart, slot)}: {value}" for slot, value in pairs)


def _apart(match: re.Match[str]) -> str:
    return f"{match[1]} {match[2].lower()}"


def score(outputs: Sequence[str], meanings: Sequence[Meaning]) -> dict[str, float]:
    """Scores against the own record, and the same outputs against another record's references and values."""
    records = [meaning.record for meaning in meanings]
    references = [meaning.references for meaning in meanings]
    values = [meaning.values for meaning in meanings]
    return {
        "bleu": bleu(outputs, references),
        "bleu_swapped": swapped_score(bleu, outputs, references, records),
        "rouge_l": rouge_l(outputs, references),
        "rouge_l_swapped": swapped_score(rouge_l, outputs, references, records),
        "slots": present_share(outputs, values),
        "slots_swapped": present_share(outputs, swapped(values, records)),
        "distinct": len(set(outputs)) / len(outputs),
    }


def human_score(meanings: Sequence[Meaning]) -> dict[str, float]:
    """What a person scores: the first reference of each record against its others, where there are others."""
    several = [meaning for meaning in meanings if len(meaning.references) > 1]
    others = [Meaning(meaning.record, meaning.references[1:]) for meaning in several]
    return score([meaning.references[0] for meaning in several], others)


def fixed_text(candidates: Sequence[str], meanings: Sequence[Meaning]) -> str:
    """The one text that scores best when it is said of every record: what can be had without reading any input."""
    references = [meaning.references for meaning in meanings]
    return max(candidates, key=lambda text: bleu([text] * len(references), references))
