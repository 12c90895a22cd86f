"""Answers to questions about a text, compared as SQuAD does: without case, punctuation and articles.

https://arxiv.org/abs/1606.05250
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from deltatune.evaluate.text import References, check_references

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """Lower case, no ASCII punctuation, none of the words a, an, the, single spaces."""
    plain = answer.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def squad_exact_match(outputs: Sequence[str], references: References) -> float:
    """Share of outputs that equal one of their references once both are normalised."""
    check_references(outputs, references)
    hits = [normalised(out) in {normalised(ref) for ref in row} for out, row in zip(outputs, references)]
    return sum(hits) / len(hits)


def squad_f1(outputs: Sequence[str], references: References) -> float:
    """Mean over the rows of the F1 of words shared with the best reference, 0 to 1."""
    check_references(outputs, references)
    return sum(max(_words_f1(out, ref) for ref in row) for out, row in zip(outputs, references)) / len(outputs)


def _words_f1(output: str, reference: str) -> float:
    said, meant = normalised(output).split(), normalised(reference).split()
    if not said or not meant:
        return float(said == meant)
    return 2 * sum((Counter(said) & Counter(meant)).values()) / (len(said) + len(meant))
