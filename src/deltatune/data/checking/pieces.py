"""A row as the model gets it: runs of tokens that are learnt, and of those that are not, as text."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from deltatune.data.encode import Encoder
from deltatune.data.example import CAUSAL_TASKS, Example
from deltatune.data.features import IGNORE, Features
from deltatune.data.passages import Passage, windows
from deltatune.data.tagging import Tagged

Pieces = list[tuple[str, bool]]


def pieces(encoder: Encoder, example: Example) -> tuple[Features, bool, Pieces]:
    """The features, whether a limit cut something, and the runs."""
    tokenizer = encoder.tokenizer
    if isinstance(example, Passage):
        cuts = windows(encoder, example)
        row = next((each for each in cuts if each.targets), cuts[0])
        first, last = row.labels
        learnt = [row.targets > 0 and first <= place <= last for place in range(len(row.input_ids))]
        return row, len(cuts) > 1, _runs(tokenizer, row.input_ids, learnt)
    row, cut = encoder(example)
    if isinstance(example, Tagged):
        tagged = " ".join(word if tag == "O" else f"{word}[{tag}]" for word, tag in zip(example.words, example.tags))
        return row, cut, [(tokenizer.decode(row.input_ids), False), (tagged, True)]
    if encoder.task in CAUSAL_TASKS:
        return row, cut, _runs(tokenizer, row.input_ids, [label != IGNORE for label in row.labels])
    if encoder.task == "classification":
        assert encoder.labels is not None
        answer = encoder.labels.names[row.labels[0]]
    else:
        answer = tokenizer.decode(row.labels)
    return row, cut, [(tokenizer.decode(row.input_ids), False), (answer, True)]


def _runs(tokenizer: Any, ids: list[int], learnt: list[bool]) -> Pieces:
    """Each run is what the text has more with it: tokens alone would lose the blanks between them."""
    made: Pieces = []
    start, before = 0, ""
    for told, group in groupby(learnt):
        end = start + len(list(group))
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        # where a character is split between two runs, the first one ends in a mark that the second takes back
        made.append((text[len(before) :] if text.startswith(before) else tokenizer.decode(ids[start:end]), told))
        start, before = end, text
    return made
