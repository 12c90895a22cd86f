"""How much of what the input asks for is in the output, in its own words."""

from __future__ import annotations

import re
from collections.abc import Sequence


def bracketed_slots(record: str) -> dict[str, str]:
    """The slots of a record such as `name[The Vaults], area[riverside]`."""
    return {name.strip(): value for name, value in re.findall(r"([^,\[\]]+)\[([^\]]*)\]", record)}


def present_share(outputs: Sequence[str], values: Sequence[Sequence[str]]) -> float:
    """Share of the values (all rows together) that stand in the output of their row, whole words, case ignored."""
    wanted = [(_plain(out), _plain(value)) for out, row in zip(outputs, values, strict=True) for value in row]
    if not wanted:
        return 0.0
    return sum(f" {value} " in f" {out} " for out, value in wanted) / len(wanted)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
