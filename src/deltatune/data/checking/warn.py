"""What training would accept and people should look at, one sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deltatune.data.checking.report import Leak, PartReport

MUCH = 0.05  # share of the rows from which on a cut or a duplicate is worth a warning
UNEVEN = 10  # times that one class may have the rows of another


def warnings(task: str, limit: int, parts: Sequence[PartReport], leaks: Sequence[Leak]) -> list[str]:
    return [*_leaks(leaks), *(told for part in parts for told in _part(task, limit, part))]


def _leaks(leaks: Sequence[Leak]) -> Iterator[str]:
    for leak in leaks:
        if leak.same_inputs:
            first = ", ".join(f"line {mine} (train line {other})" for mine, other in leak.lines[:3])
            yield (
                f"{leak.part}: {leak.same_inputs} inputs are also trained on, {leak.same_answers} of them with the "
                f"same answer: {first}; scores on them say nothing"
            )


def _part(task: str, limit: int, part: PartReport) -> Iterator[str]:
    many = max(1, MUCH * part.rows)
    if part.left_out:
        yield f"{part.name}: {part.left_out} of {part.rows} rows are left out by max_length={limit}"
    if part.cut - part.left_out >= many:
        longest = part.tokens.most
        yield f"{part.name}: {part.cut - part.left_out} of {part.rows} rows are cut; the longest has {longest} tokens"
    if part.duplicates >= many:
        lines = ", ".join(map(str, part.repeated[0])) if part.repeated else ""
        yield f"{part.name}: {part.duplicates} rows are there already, such as lines {lines}"
    if part.special:
        shown = ", ".join(f"{mark} in {count} rows" for mark, count in list(part.special.items())[:4])
        yield f"{part.name}: special tokens stand in the text ({shown}) and act as such"
    if part.without_end:
        yield f"{part.name}: {part.without_end} rows have no end to learn; the model may not stop"
    if part.unlike_prompts:
        yield (
            f"{part.name}: {part.unlike_prompts} conversations begin with other tokens than generation will; the chat "
            "template joins prompt and answer within a token"
        )
    if task == "classification" and part.contradictions:
        yield f"{part.name}: {part.contradictions} inputs have more than one label"
    yield from _balance(task, part)


def _balance(task: str, part: PartReport) -> Iterator[str]:
    counts = part.labels
    if not counts:
        return
    lacking = [name for name, count in counts.items() if not count]
    if lacking:
        yield f"{part.name}: no row has the label {', '.join(map(repr, lacking[:5]))}"
    most, least = max(counts, key=lambda name: counts[name]), min(counts, key=lambda name: counts[name])
    if task == "classification" and counts[least] and counts[most] >= UNEVEN * counts[least]:
        yield f"{part.name}: label {most!r} has {counts[most]} rows, {least!r} only {counts[least]}"
