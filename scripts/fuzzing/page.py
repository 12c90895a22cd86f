"""The figures of `scripts/fuzz.py --record`, portions added up, into docs/reliability.md.

python -m scripts.fuzzing.page build/fuzz
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- fuzz -->\n", "<!-- end of fuzz -->\n"
RECORD = "record.jsonl"


def record(
    keep: Path, target: str, first: int, cases: int, bad: int, kinds: Counter[str], slowest: Any, largest: Any
) -> None:
    """Add one portion to the record in the folder `keep`."""
    facts = {
        "target": target, "first": first, "cases": cases, "bad": bad, "kinds": dict(kinds),
        "seconds": slowest.seconds, "megabytes": largest.kilobytes / 1024,
    }  # fmt: skip
    keep.mkdir(parents=True, exist_ok=True)
    with open(keep / RECORD, "a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


def summed(lines: list[str]) -> dict[str, dict[str, Any]]:
    """By target: how many cases ended how. A portion that was run twice counts as it ended last."""
    portions = {(one["target"], one["first"], one["cases"]): one for one in map(json.loads, lines)}
    sums: dict[str, dict[str, Any]] = {}
    ends: dict[str, int] = {}
    for (target, first, cases), one in sorted(portions.items()):
        if first < ends.get(target, 0):
            raise ValueError(f"portion {first} of {target} overlaps with the one before; remove one of them")
        ends[target] = first + cases
        into = sums.setdefault(target, {"cases": 0, "bad": 0, "kinds": Counter(), "seconds": 0.0, "megabytes": 0.0})
        into["cases"] += cases
        into["bad"] += one["bad"]
        into["kinds"].update(one["kinds"])
        for most in ("seconds", "megabytes"):
            into[most] = max(into[most], one[most])
    return sums


def table(sums: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| mutated | cases | loaded | refused | anything else | slowest | most memory | refused as |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for target, one in sorted(sums.items()):
        well = one["kinds"]["ok"]
        refused = Counter({kind: count for kind, count in one["kinds"].items() if kind.endswith("Error")})
        said = ", ".join(f"{kind} {count:,}" for kind, count in refused.most_common() if not kind.startswith("CRASH"))
        lines.append(
            f"| {target} | {one['cases']:,} | {well:,} | {one['cases'] - well - one['bad']:,} | {one['bad']} | "
            f"{one['seconds']:.2f} s | {one['megabytes']:.0f} MB | {said} |"
        )
    return "\n".join(lines) + "\n"


def main(keep: Path) -> None:
    text = table(summed((keep / RECORD).read_text(encoding="utf-8").splitlines()))
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page.split(BEGIN)[0] + BEGIN + text + END + page.split(END)[1], encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("build/fuzz"))
