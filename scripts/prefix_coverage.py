"""Put the checks of the conformance tool to every model type of transformers that its list does not hold.

    python scripts/prefix_coverage.py                          resume, and print the totals
    python scripts/prefix_coverage.py --only t5gemma2,canine   some types, anew
    python scripts/prefix_coverage.py --write                  the tables of docs/prefix-coverage.md

Toys are made from default configs by shrinking their fields (scripts/coverage/shrink.py). A type of which no toy can
be made, or which needs inputs that the tool does not have, is listed as not asked. Results are kept in a file, a line
each.
Needs the folder with the conformance tool: DELTATUNE_SHARED.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from scripts.coverage.catalogue import TASKS, Entry, entries, settings  # noqa: E402

PAGE, BEGIN, END = ROOT / "docs" / "prefix-coverage.md", "<!-- tables -->\n", "<!-- end of tables -->\n"
RESULTS = Path(tempfile.gettempdir()) / "prefix_coverage.jsonl"
CHECKS = (1, 2, 4, 7)  # wrap, gradient, generate, padding
LARGEST = 20_000_000  # parameters
SECONDS = 120
VERDICTS = ("complete", "partial", "base", "refused", "failing", "not asked")


class TooLong(BaseException):
    """No check may swallow it."""


def tool() -> tuple[Any, Any]:
    """The list and the checks of the conformance tool, with one more family: masked language models."""
    sys.path.insert(0, str(Path(os.environ["DELTATUNE_SHARED"]) / "conformance"))
    listed: Any = importlib.import_module("architectures")
    checks: Any = importlib.import_module("prefix_checks")
    listed.FAMILIES["masked"] = ("AutoModelForMaskedLM", "FEATURE_EXTRACTION")
    listed.TEXT_FAMILIES = (*listed.TEXT_FAMILIES, "masked")
    return listed, checks


def asked(entry: Entry, numbers: tuple[int, ...]) -> dict[str, Any]:
    """What the checks say of one type."""
    import deltatune

    listed, checks = tool()
    record: dict[str, Any] = {"type": entry.model_type, "family": entry.family, "task": entry.auto_class}
    try:
        features = (16, 128) if entry.family == "speech-to-text" else None
        toy = listed.Architecture(
            entry.model_type, entry.family, entry.model_type, settings(entry), auto_class=entry.auto_class,
            features=features,
        )  # fmt: skip
        model = listed.build(toy)
        record["class"] = type(model).__name__
        size = sum(parameter.numel() for parameter in model.parameters())
        if size > LARGEST:
            raise ValueError(f"its toy has {size:,} parameters")
        subject = checks.Subject(deltatune, toy)
        with torch.no_grad():
            checks.logits(model(**subject.batch.inputs))
    except Exception as error:  # any model may raise anything
        return {**record, "not asked": f"{type(error).__name__}: {' '.join(str(error).split())[:140]}"}
    for check in checks.CHECKS:
        if check.number in numbers:
            result = checks.run_check(check, subject)
            record[check.name] = result.status
            if result.status not in ("pass", "n/a"):
                record[f"why {check.name}"] = result.message[:300]
            if result.status == "FAIL" and result.base_failures:
                record[f"base {check.name}"] = sorted(result.base_failures)
            if result.status == "REFUSED":
                break
    return record


def verdict(record: dict[str, Any]) -> str:
    """One of `VERDICTS`: `base` where the bare model fails a part of each check that does not pass."""
    if "not asked" in record:
        return "not asked"
    found = {name: status for name, status in record.items() if status in ("PART", "FAIL", "REFUSED")}
    if "REFUSED" in found.values():
        return "refused"
    if any(status == "FAIL" and f"base {name}" not in record for name, status in found.items()):
        return "failing"
    if "FAIL" in found.values():
        return "base"
    return "partial" if found else "complete"


def with_limit(entry: Entry, numbers: tuple[int, ...]) -> dict[str, Any]:
    def stop(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return asked(entry, numbers)
    except TooLong:
        return {"type": entry.model_type, "family": entry.family, "task": entry.auto_class,
                "not asked": f"no answer within {SECONDS} seconds"}  # fmt: skip
    finally:
        signal.alarm(0)


def tables(records: list[dict[str, Any]]) -> str:
    """Totals by task, and every type that is not complete, with the reason."""
    lines = ["| task | " + " | ".join(VERDICTS) + " |", "|---" * (len(VERDICTS) + 1) + "|"]
    for task, _, _ in TASKS:
        counts = Counter(verdict(record) for record in records if record["task"] == task)
        lines.append(f"| {task} | " + " | ".join(str(counts[name]) for name in VERDICTS) + " |")
    counts = Counter(map(verdict, records))
    lines.append(f"| all {len(records)} | " + " | ".join(str(counts[name]) for name in VERDICTS) + " |")
    for name in VERDICTS[1:]:
        chosen = [record for record in records if verdict(record) == name]
        if chosen:
            lines += ["", f"### {name}", "", "| type | what was said |", "|---|---|"]
            lines += [f"| {record['type']} | {_said(record)} |" for record in chosen]
    return "\n".join(lines) + "\n"


def _said(record: dict[str, Any]) -> str:
    said = record.get("not asked") or "; ".join(str(record[name]) for name in record if name.startswith("why "))
    return said.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="model types, separated by commas, asked anew")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"kept between runs; {RESULTS} when left out")
    parser.add_argument("--all-checks", action="store_true", help="all eight instead of 1, 2, 4 and 7")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/prefix-coverage.md")
    options = parser.parse_args()
    if "DELTATUNE_SHARED" not in os.environ:
        parser.error("DELTATUNE_SHARED is not set: the folder that holds conformance/prefix_checks.py")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import transformers

    transformers.logging.set_verbosity_error()
    listed, _ = tool()
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    kept = {record["type"]: record for record in map(json.loads, lines)}
    chosen = set(options.only.split(",")) if options.only else None
    every = list(entries({each.model_type for each in listed.ARCHITECTURES.values()}))
    numbers = tuple(range(1, 9)) if options.all_checks else CHECKS
    with options.results.open("a") as file:
        for entry in every:
            if entry.model_type in kept if chosen is None else entry.model_type not in chosen:
                continue
            kept[entry.model_type] = record = with_limit(entry, numbers)
            print(f"{entry.model_type:32} {verdict(record):10} {_said(record)}", flush=True)
            file.write(json.dumps(record) + "\n")
            file.flush()
    records = [kept[entry.model_type] for entry in every if entry.model_type in kept]
    print(dict(Counter(map(verdict, records))))
    if options.write:
        page = PAGE.read_text()
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(before + BEGIN + "\n" + tables(records) + "\n" + END + after)


if __name__ == "__main__":
    main()
