"""Which cases of the laws `make test` runs: of each law one for every method, and a share of the others.

Compiling costs seconds a case, so of the laws about that each run has an eighth of the methods.

The choice is another one each day, or under another seed, which the header of the run shows. What is not chosen is
marked slow, and `make test-all` runs every one.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

SHARE, COMPILED = 1 / 64, 1 / 8  # there are 35,000 cases


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    groups: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        # the laws stack any adapters on a layer; that one of them replaces what is before it is said elsewhere
        item.add_marker(pytest.mark.filterwarnings("ignore:set_adapter. .* replaces the whole weight"))
        item.add_marker(pytest.mark.filterwarnings("ignore:merge_adapter. rounding"))  # half precision loses a part
        item.add_marker(pytest.mark.filterwarnings("ignore:adapter .* has seen no data"))  # a start that nothing feeds
        method = _method(item)
        if method is not None:
            groups.setdefault((item.nodeid.partition("[")[0], method), []).append(item)
    for key, group in groups.items():
        draw = random.Random(f"{os.environ['DELTATUNE_LAW_SEED']} {key}")
        compiles = "compile" in key[0]
        chosen = draw.choice(group) if not compiles or draw.random() < COMPILED else None
        for item in group:
            if item is not chosen and (compiles or draw.random() >= SHARE):
                item.add_marker(pytest.mark.slow)


def _method(item: pytest.Item) -> str | None:
    """The method that an item is about; None where it is about a pair, or none."""
    params: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    return getattr(params.get("case"), "method", params.get("name"))
