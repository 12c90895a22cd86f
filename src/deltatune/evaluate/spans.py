"""The likeliest span of a context: the pair of first and last token with the highest sum of logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltatune.data.passages import Window

SpanLogits = tuple[Tensor, Tensor]  # of being the first and the last token, (T,) each, T at least the window's length


def best_span(window: Window, logits: SpanLogits, longest: int) -> tuple[float, int, int] | None:
    """(sum of logits, first character, character behind the last) among spans of at most `longest` tokens.

    None where the window holds nothing of the context.
    """
    inside = [i for i, place in enumerate(window.places) if place is not None and place[1] > place[0]]
    if not inside:
        return None
    first, last = (part[inside] for part in logits)
    sums = first[:, None] + last[None, :]  # (first token, last token)
    allowed = torch.ones_like(sums, dtype=torch.bool).triu().tril(longest - 1)
    best = int(sums.masked_fill(~allowed, -torch.inf).argmax())
    start, end = (window.places[inside[i]] for i in divmod(best, len(inside)))
    assert start is not None and end is not None
    return float(sums.flatten()[best]), start[0], end[1]


def read_spans(
    windows: Sequence[Window], logits: Sequence[SpanLogits], contexts: Sequence[str], longest: int
) -> list[str]:
    """The answer in each context: the best span of all its windows."""
    best = [(-torch.inf, "")] * len(contexts)
    for window, pair in zip(windows, logits):
        found = best_span(window, pair, longest)
        if found is not None and found[0] > best[window.row][0]:
            best[window.row] = found[0], contexts[window.row][found[1] : found[2]].strip()
    return [text for _, text in best]
