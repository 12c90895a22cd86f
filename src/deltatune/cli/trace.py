"""`deltatune trace`: one batch through an adapted model, stop by stop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from deltatune.cli.arguments import parse
from deltatune.cli.show import console, quiet_libraries


def trace(
    words: Sequence[str],
    model: str | None,
    texts: list[str],
    targets: list[str],
    method: str,
    html: str | None,
    every: bool,
    as_json: bool,
) -> None:
    from deltatune.cli.train import flags
    from deltatune.trace import run

    given = parse(words, flags())
    quiet_libraries()
    report = run(
        model=model,
        adapter=given.config,
        text=texts or None,
        target=targets or None,
        method=method,
        html=None if html is None else Path(html),
        console=None if as_json else console(),
        options=given.settings,
        every=every,
    )
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    elif html is not None:
        print(f"page: {html}")
