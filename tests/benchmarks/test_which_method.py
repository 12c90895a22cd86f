"""The benchmark of `compare`: what is compared, the files that it is given, and the page that is drawn."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import which_method
from which_method import METHODS, TASKS


def test_every_method_has_three_rates_and_every_task_the_same_methods():
    assert len(METHODS) == 6 and len(TASKS) == 3 and which_method.SEEDS == 3
    assert all(len(rates) == 3 for _, rates in METHODS.values())


def test_no_training_row_is_among_those_that_choose_or_judge(tmp_path, shared_data):
    for name, task in TASKS.items():
        files = which_method.written(name, task, tmp_path / name)
        held = {part: files[part].read_text(encoding="utf-8").splitlines() for part in files}
        assert [len(held[part]) for part in ("train", "dev", "test")] == [task.train, task.dev, task.test]
        asked = {part: {next(iter(json.loads(line).values())) for line in lines} for part, lines in held.items()}
        assert not asked["dev"] & asked["test"], name


def test_the_page_shows_the_chosen_rate_the_verdict_and_what_failed():
    found = {
        "choice": {"LoRA": {"0.001": 0.5, "0.003": 0.75, "0.01": None}},
        "rates": {"LoRA": 0.003},
        "verdict": ["LoRA is ahead."],
        "failed": {"IA3": "no memory"},
        "table": "| the table |",
        "budget": [10, 4, 4, 3, 2, 16],
        "under": {"machine": "x86", "load": [0.1, 2.0]},
    }
    page = which_method.render({"e2e": found})
    assert "0.001: 0.500, **0.003: 0.750**, 0.01: failed" in page
    for part in ("| the table |", "- LoRA is ahead.", "- IA3 failed: no memory", "images/which-method-e2e.png"):
        assert part in page
    assert "banking77" not in page


@pytest.mark.slow  # a process for each run
def test_a_task_is_measured_and_drawn(tmp_path, shared_data, monkeypatch):
    monkeypatch.setattr(which_method, "METHODS", {name: METHODS[name] for name in ("LoRA", "IA3")})
    task = replace(TASKS["e2e"], train=16, dev=4, test=30, steps=2, choice=1)
    found = which_method.measure("e2e", task, tmp_path, "demo")
    assert set(found["rates"]) == set(found["scores"]) == {"LoRA", "IA3"} and not found["failed"]
    assert all(len(scores) == 3 for scores in found["scores"].values())
    assert "LoRA" in which_method.render({"e2e": {**found, "under": {"machine": "x86", "load": [0, 0]}}})
