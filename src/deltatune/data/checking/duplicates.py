"""Rows that are there twice, within one part or in two, letter by letter or nearly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from deltatune.data.alike import normal
from deltatune.data.checking.report import Leak
from deltatune.data.example import Example
from deltatune.data.tagging import Tagged

SHOWN = 5


def repetitions(examples: Sequence[Example]) -> tuple[int, int, list[list[int]], int]:
    """(duplicates, near duplicates beside them, lines of the first groups, inputs with several answers)."""
    exact: dict[Any, list[int]] = defaultdict(list)
    near: dict[Any, int] = defaultdict(int)
    answers: dict[Any, set[str]] = defaultdict(set)
    for example in examples:
        exact[_row(example)].append(example.line)
        near[_near(example)] += 1
        if example.target is not None:
            answers[example.text, example.task_id].add(example.target)
    duplicates = sum(len(lines) - 1 for lines in exact.values())
    nearly = sum(count - 1 for count in near.values()) - duplicates
    groups = [lines[:SHOWN] for lines in exact.values() if len(lines) > 1][:SHOWN]
    return duplicates, nearly, groups, sum(len(found) > 1 for found in answers.values())


def leak(name: str, examples: Sequence[Example], train: Sequence[Example]) -> Leak:
    """What of a part the training rows hold too."""
    lines: dict[str, int] = {}
    answers: dict[str, set[Any]] = defaultdict(set)
    for example in train:
        lines.setdefault(normal(example.text), example.line)
        answers[normal(example.text)].add(_row(example)[1:])
    same = [example for example in examples if normal(example.text) in lines]
    again = sum(_row(example)[1:] in answers[normal(example.text)] for example in same)
    return Leak(name, len(same), again, [(example.line, lines[normal(example.text)]) for example in same[:SHOWN]])


def _row(example: Example) -> Any:
    tags = example.tags if isinstance(example, Tagged) else ()
    return example.text, example.target, example.task_id, tags


def _near(example: Example) -> Any:
    text, target, *rest = _row(example)
    return normal(text), None if target is None else normal(target), *rest
