"""Generated text against one or more references: corpus BLEU, ROUGE, exact match."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from deltatune.errors import DataError

References = Sequence[Sequence[str]]  # references[i]: all that are right for output i


def bleu(outputs: Sequence[str], references: References) -> float:
    """Corpus BLEU of sacrebleu, 0 to 100; rows may have different numbers of references."""
    import sacrebleu

    check_references(outputs, references)
    most = max(len(row) for row in references)
    # sacrebleu wants the k-th references of all rows side by side, None where a row has fewer
    columns = [[row[k] if k < len(row) else None for row in references] for k in range(most)]
    return sacrebleu.corpus_bleu(list(outputs), columns).score  # type: ignore[arg-type]


def rouge_l(outputs: Sequence[str], references: References) -> float:
    """Mean F1 of the longest common subsequence of words with the best reference, 0 to 100.

    https://aclanthology.org/W04-1013, words as in the package rouge-score: lower case letters and digits, no stemming.
    """
    check_references(outputs, references)
    scores = [max(_lcs_f1(_words(out), _words(ref)) for ref in row) for out, row in zip(outputs, references)]
    return 100 * sum(scores) / len(scores)


def rouge_n(outputs: Sequence[str], references: References, n: int) -> float:
    """Mean F1 of runs of n words (n = 1: ROUGE-1) with the best reference, 0 to 100; words as in `rouge_l`."""
    check_references(outputs, references)
    scores = [max(_runs_f1(_words(out), _words(ref), n) for ref in row) for out, row in zip(outputs, references)]
    return 100 * sum(scores) / len(scores)


def exact_match(outputs: Sequence[str], references: References) -> float:
    """Share of outputs that equal a reference, white space at the ends aside."""
    check_references(outputs, references)
    hits = [out.strip() in {ref.strip() for ref in row} for out, row in zip(outputs, references)]
    return sum(hits) / len(hits)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _runs_f1(a: list[str], b: list[str], n: int) -> float:
    said, meant = (Counter(zip(*(words[i:] for i in range(n)))) for words in (a, b))
    if not said or not meant:
        return 0.0
    return 2 * (said & meant).total() / (said.total() + meant.total())


def _lcs_f1(a: list[str], b: list[str]) -> float:
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)  # row[j]: longest common subsequence of the words of a so far and b[:j]
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    common = row[-1]
    if common == 0:
        return 0.0
    precision, recall = common / len(a), common / len(b)
    return 2 * precision * recall / (precision + recall)


def check_references(outputs: Sequence[str], references: References) -> None:
    """Raises DataError unless every output has its references."""
    if not outputs or len(outputs) != len(references) or not all(references):
        raise DataError(
            f"{len(outputs)} outputs and {len(references)} rows of references; "
            "expected as many, at least one, and a reference in every row",
            found=len(outputs),
            expected=len(references),
        )
