"""`deltatune doctor`: would other programs load this adapter, and compute the same with it?"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import typer
from rich.text import Text

from deltatune.cli.failures import FILE
from deltatune.cli.show import console
from deltatune.doctor.judge import Diagnosis
from deltatune.doctor.verdict import Effect, Verdict

COLOURS = {Effect.REFUSES: "red", Effect.CHANGES: "red", Effect.NEEDS: "yellow", Effect.UNSURE: "yellow"}


def doctor(folder: str, programs: list[str], as_json: bool) -> None:
    """Exits with 3 where the folder is broken, or a program that was asked for would not do right."""
    from deltatune.doctor import diagnose

    found = diagnose(folder, programs or None)
    if as_json:
        print(json.dumps(_plain(found), indent=2, default=str))
    else:
        _show(found)
    if not found.healthy or (programs and not all(verdict.loads for verdict in found.verdicts.values())):
        raise typer.Exit(FILE)


def _plain(found: Diagnosis) -> dict[str, Any]:
    verdicts = {
        name: {**asdict(verdict), "loads": verdict.loads, "word": verdict.word}
        for name, verdict in found.verdicts.items()
    }
    return {
        "folder": found.folder,
        "method": found.facts.method if found.facts else None,
        "problems": list(found.problems),
        "verdicts": verdicts,
    }


def _show(found: Diagnosis) -> None:
    out = console()
    if found.facts is not None:
        rank = f", rank {', '.join(map(str, found.facts.ranks))}" if found.facts.ranks else ""
        out.print(Text(f"{found.folder}: {found.facts.method}{rank}"), soft_wrap=True)
    for problem in found.problems:
        out.print(Text.assemble(("problem", "red"), f": {problem}"), soft_wrap=True)
    for verdict in found.verdicts.values() if found.facts is not None else ():
        _verdict(verdict)


def _verdict(verdict: Verdict) -> None:
    out, colour = console(), "green" if verdict.loads else "red"
    out.print()
    out.print(Text.assemble((verdict.program, "bold"), f" {verdict.version}: ", (verdict.word, colour)))
    for finding in verdict.findings:
        out.print(
            Text.assemble("  ", (finding.effect.value, COLOURS[finding.effect]), f"  {finding.what}"), soft_wrap=True
        )
        if finding.fix:
            out.print(Text(f"  {'':{len(finding.effect.value)}}  -> {finding.fix}", style="dim"), soft_wrap=True)
