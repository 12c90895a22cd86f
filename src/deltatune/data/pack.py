"""Several rows in one, as long as the limit allows, without any of them seeing another.

Positions begin anew with each row, and there is no attention mask: from that transformers makes a mask of blocks, in
which a token attends to what stands before it in its own row. Whether a model keeps to it is tried, not looked up by
its name (`deltatune.train.packing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltatune.data.features import Features


@dataclass(frozen=True)
class Pack(Features):
    """Rows behind each other. The first label of each is ignored, so nothing is predicted across a border."""

    sizes: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[Features]) -> Pack:
        return cls(
            [token for row in rows for token in row.input_ids],
            [label for row in rows for label in row.labels],
            sum(row.targets for row in rows),
            whole=sum(row.whole for row in rows),
            sizes=tuple(size for row in rows for size in (row.sizes if isinstance(row, Pack) else [row.length])),
        )

    @property
    def rows(self) -> int:
        return len(self.sizes)

    @property
    def positions(self) -> list[int]:
        return [place for size in self.sizes for place in range(size)]


def packed(rows: Sequence[Features], limit: int) -> list[Pack]:
    """Each row once, in as few packs of at most `limit` tokens as best fit finds (longest first)."""
    bins: list[list[int]] = []
    room: dict[int, list[int]] = {}  # tokens left -> bins with exactly that much
    for place in sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids)):
        size = len(rows[place].input_ids)
        left = next((tokens for tokens in range(size, limit + 1) if room.get(tokens)), None)
        if left is None:
            bins.append([place])
            chosen, left = len(bins) - 1, max(limit, size)
        else:
            chosen = room[left].pop()
            bins[chosen].append(place)
        room.setdefault(left - size, []).append(chosen)
    return [Pack.of([rows[i] for i in sorted(places)]) for places in bins]
