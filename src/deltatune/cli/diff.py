"""`deltatune diff`: how two adapters differ."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict

from rich.text import Text

from deltatune.cli.show import console, facts, table
from deltatune.inspect.adapter import pattern
from deltatune.inspect.difference import AdapterDifference, Distance

SHOWN = 12  # layers that differ most


def diff(first: str, second: str, every: bool, as_json: bool) -> None:
    from deltatune.inspect import diff_adapters

    found = diff_adapters(first, second)
    if as_json:
        print(json.dumps({**asdict(found), "identical": found.identical}, indent=2, default=str))
    else:
        _show(found, every)


def _show(found: AdapterDifference, every: bool) -> None:
    out = console()
    bases = {True: "the same", False: "not the same", None: "not known of both"}[found.same_base]
    methods = found.methods[0] if found.methods[0] == found.methods[1] else " and ".join(found.methods)
    out.print(facts([("first", found.folders[0]), ("second", found.folders[1]), ("method", methods), ("base", bases)]))
    out.print()
    if found.options:
        rows = [
            (name, json.dumps(a, default=str), json.dumps(b, default=str)) for name, (a, b) in found.options.items()
        ]
        out.print(table(("option", "first", "second"), rows))
        out.print()
    for words, names in (("only in the first", found.only_first), ("only in the second", found.only_second)):
        for name, count in _grouped(names).items():
            out.print(Text(f"{words}: {name}" + (f" ({count})" if count > 1 else "")), soft_wrap=True)
    for name, (one, other) in found.unlike.items():
        out.print(Text(f"other shapes: {name} {' x '.join(map(str, one))} and {' x '.join(map(str, other))}"))
    _distances(found.distances, every)
    out.print("the same change of the same layers" if found.identical else "the two differ")


def _grouped(names: list[str]) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for name in names:
        counts[pattern(name)] += 1
    return counts


def _distances(distances: list[Distance], every: bool) -> None:
    apart = sorted((d for d in distances if d.relative > 0), key=lambda d: -d.relative)
    if not apart:
        return
    shown = apart if every else apart[:SHOWN]
    rows = [
        (
            d.name.removesuffix(".weight"),
            f"{d.norms[0]:.3g}",
            f"{d.norms[1]:.3g}",
            f"{d.relative:.3g}",
            "-" if d.cosine is None else f"{d.cosine:+.2f}",
        )
        for d in shown
    ]
    out = console()
    out.print(table(("layer or tensor", "|first|", "|second|", "apart", "cosine"), rows, numbers="lrrrr"))
    out.print()
    same = len(distances) - len(apart)
    out.print(
        f"{len(apart)} differ, {same} are the same"
        + (f"; the {SHOWN} most unlike are shown (--all)" if len(apart) > len(shown) else "")
    )
