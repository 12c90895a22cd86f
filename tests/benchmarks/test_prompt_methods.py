"""The benchmark of prompt methods: what is compared is comparable, and every kind of task runs with toy models."""

from __future__ import annotations

from dataclasses import replace

import prompt_methods
import pytest
from harness import data, records, sentences
from harness.cells import Cell, Store
from harness.progress import Line

from deltatune.data import prepare, table_of
from deltatune.demo import base as demo_base
from deltatune.errors import DataError
from deltatune.train.method import method_names
from tests.train import toys

TINY = {
    "train_rows": 160, "dev_rows": 6, "test_rows": 6, "test_records": 4, "max_steps": 2,
    "per_device_train_batch_size": 4, "max_length": 40, "max_target_length": 8,
}  # fmt: skip
STUDIES = prompt_methods.studies(quick=True)


def study_of(label):
    return next(study for study in STUDIES if study.spec.task + "/" + study.spec.method == label)


def tiny(study):
    budget = {name: value for name, value in TINY.items() if name in study.spec.budget}
    return replace(study, spec=replace(study.spec, budget={**study.spec.budget, **budget}))


def exists(study):
    return study.spec.hyper.get("method", "full") in method_names()


# each way through a cell once, those of methods that are not there yet left out
CELLS = [
    (task, method)
    for task, methods in {
        "sentence_polarity": ("prefix_text", "floor", "prompt_text", "multitask"),
        "wnut17": ("lora", "floor", "p_tuning"),
        "squad_newwiki": ("prefix", "floor", "prompt"),
        "e2e": ("prefix_text", "multitask", "floor"),
    }.items()
    for method in methods
    if exists(study_of(f"{task}/{method}"))
]


def test_every_trained_method_gets_four_values_and_three_seeds_and_prompts_the_same_four():
    for study in prompt_methods.studies():
        if "method" in study.spec.hyper:
            assert (len(study.grid), len(study.seeds)) == (4, 3)
            prompt = "num_virtual_tokens" in study.spec.hyper
            assert (study.grid == prompt_methods.PROMPT) == prompt
    for task in prompt_methods.TASKS:
        budgets = [study.spec.budget for study in prompt_methods.studies() if study.spec.task == task and study.grid]
        assert all(budget == budgets[0] for budget in budgets)


def test_no_article_is_in_two_parts(shared_data):
    parts = sentences.parts_of("squad_newwiki", prompt_methods.TASKS["squad_newwiki"].budget)
    assert [len(part) for part in parts.values()] == [800, 200, 400]
    titles = [{row["title"] for row in part} for part in parts.values()]
    assert not titles[0] & titles[1] and not titles[0] & titles[2] and not titles[1] & titles[2]


def test_parts_by_a_field_share_no_value_of_it():
    made = [{"title": letter, "place": place} for letter in "abcdef" for place in range(3)]
    parts = data.split_by(made, "title", (3, 1, 2))
    assert [len(part) for part in parts] == [9, 3, 6]
    assert data.split_by(made, "title", (3, 1, 2)) == parts
    with pytest.raises(DataError, match="7 values of title asked of 6"):
        data.split_by(made, "title", (3, 4))


@pytest.mark.parametrize("task", ["sentence_polarity", "wnut17", "squad_newwiki"])
def test_all_rows_are_as_training_wants_them(task, shared_data):
    parts = sentences.parts_of(task, {**prompt_methods.TASKS[task].budget, "train_rows": 500})
    tables = [table_of(part, name) for name, part in parts.items()]
    corpus = prepare(*tables, prompt_methods.TASKS[task].kind)
    assert len(corpus.train.examples) == 500


def test_a_shared_prompt_sees_both_tasks_and_is_scored_on_one(shared_data):
    budget = {**prompt_methods.TASKS["sentence_polarity"].budget, "train_rows": 100}
    parts = sentences.parts_of("sentence_polarity", budget, both=True)
    assert [row["task"] for row in parts["train"]] == [0, 1] * 50
    assert {row["task"] for row in parts["dev"] + parts["test"]} == {0}
    assert {row["label"] for row in parts["test"]} == {"0-0", "0-1"}
    there, back = records.both_ways([{"mr": "name[Zizzi]", "ref": "Zizzi serves."}] * 2)
    assert (there["input"], there["target"], there["task"]) == ("name: Zizzi", "Zizzi serves.", 0)
    assert (back["input"], back["target"], back["task"]) == ("Zizzi serves.", "name: Zizzi", 1)


@pytest.mark.parametrize("label", ["/".join(cell) for cell in CELLS if cell[0] != "e2e"])
def test_a_cell_is_trained_scored_and_drawn(label, tmp_path, shared_data, monkeypatch):
    if label == "sentence_polarity/floor":
        pytest.importorskip("sklearn", reason="the linear probe needs scikit-learn; pip install 'deltatune[bench]'")
    folder = toys.bert(tmp_path / "bert")
    toys.pieces().save_pretrained(folder)
    monkeypatch.setattr(prompt_methods.minilm, "minilm_folder", lambda: folder)
    study = tiny(study_of(label))
    (spec,) = study.tries()
    result = prompt_methods.run(spec, tmp_path / "work", Line("test"))
    names = {name for name, _ in prompt_methods.TASKS[spec.task].scores}
    for part in ("dev", "test"):
        assert names <= set(result[part])
        assert all(0 <= result[part][name] <= 1 for name in names)
    store = Store(tmp_path / "cells")
    store.put(Cell(spec, result, {"machine": "m", "cores": 2, "threads": 1, "torch": "2", "load": [1.0, 1.0]}))
    page = prompt_methods.render([study if s.label == label else s for s in STUDIES], store)
    assert f"| {prompt_methods.NAMES[spec.method]} |" in page


@pytest.mark.parametrize("method", [name for task, name in CELLS if task == "e2e"])
def test_a_generation_cell_is_trained_scored_and_drawn(method, tmp_path, shared_data):
    study = tiny(study_of(f"e2e/{method}"))
    (spec,) = study.tries()
    result = prompt_methods.run(spec, tmp_path / "work", Line("test"))
    assert {name for name, _ in prompt_methods.TASKS["e2e"].scores} <= set(result["test"])
    assert ("dev" in result) == (method != "floor")
    assert demo_base.FOLDER.is_dir()


def test_the_goal_is_told_once_all_seeds_are_there(tmp_path):
    store = Store(tmp_path)
    wanted = [s for s in prompt_methods.studies() if s.label in ("sentence_polarity/prefix", "sentence_polarity/full")]
    others = [s for s in prompt_methods.studies() if s not in wanted]
    conditions = {"machine": "m", "cores": 2, "threads": 1, "torch": "2", "load": [1.0, 1.0]}
    for study, accuracy in zip(wanted, (0.776, 0.8)):
        scores = {"accuracy": accuracy, "macro_f1": accuracy}
        result = {"dev": scores, "test": scores, "trainable_parameters": 1, "steps": 1, "train_seconds": 1.0}
        for spec in study.tries():
            store.put(Cell(spec, result, conditions))
        assert "Goal" not in prompt_methods.render([*wanted, *others], store)
        for spec in study.repeats(store):
            store.put(Cell(spec, result, conditions))
    page = prompt_methods.render([*wanted, *others], store)
    assert "Goal, 0.97 of full fine-tuning's mean accuracy: reached" in page
    assert "with 0.970." in page
    assert f"**{prompt_methods.PROMPT[0]:g}: 0.776**" in page
