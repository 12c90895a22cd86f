"""The order of runs, the choice on dev rows, and the command line that goes on where it was stopped."""

from __future__ import annotations

import dataclasses

import pytest
from harness.cells import Cell, Spec, Store
from harness.command import Benchmark, main
from harness.studies import Study, pending, select

from deltatune.errors import RequestError
from deltatune.train import TrainingInterrupted

GRID = (1e-3, 1e-4, 1e-2)


def study(method="lora", task="words", **facts):
    spec = Spec("bench", task, method, 0, {"max_steps": 10}, {"method": method}, {})
    return Study(spec, **{"grid": GRID, "seeds": (0, 1, 2), **facts})


def put(store, spec, accuracy):
    store.put(Cell(spec, {"dev": {"accuracy": accuracy, "loss": 1 - accuracy}, "test": {"accuracy": accuracy}}, {}))


def run_all(studies, store, dev):
    """Run everything; the dev accuracy is a function of the learning rate. Returns the order."""
    order = []
    while (spec := next(pending(studies, store), None)) is not None:
        rate = spec.hyper.get("learning_rate")
        order.append((spec.method, rate, spec.seed))
        put(store, spec, dev.get(rate, 0.0))
    return order


def test_each_method_comes_once_before_any_grid_and_grids_before_further_seeds(tmp_path):
    studies = [study("lora"), study("base", grid=(), seeds=(0,))]
    order = run_all(studies, Store(tmp_path), {1e-3: 0.5, 1e-4: 0.4, 1e-2: 0.8})
    assert order == [
        ("lora", 1e-3, 0),
        ("base", None, 0),
        ("lora", 1e-4, 0),
        ("lora", 1e-2, 0),
        ("lora", 1e-2, 1),
        ("lora", 1e-2, 2),
    ]
    assert [s.finished(Store(tmp_path)) for s in studies] == [s.size for s in studies] == [5, 1]


def test_the_best_dev_score_is_chosen_whether_high_or_low_is_good(tmp_path):
    store = Store(tmp_path)
    lora = study()
    for spec, accuracy in zip(lora.tries(), (0.5, 0.7, 0.6)):
        put(store, spec, accuracy)
    by_loss = dataclasses.replace(lora, score="loss", lower_is_better=True)
    by_high_loss = dataclasses.replace(lora, score="loss")
    assert [s.chosen(store).spec.hyper["learning_rate"] for s in (lora, by_loss, by_high_loss)] == [1e-4, 1e-4, 1e-3]


def test_a_tie_goes_to_the_likelier_value(tmp_path):
    store = Store(tmp_path)
    for spec in study().tries():
        put(store, spec, 0.5)
    assert study().chosen(store).spec.hyper["learning_rate"] == GRID[0]


def test_further_seeds_wait_until_the_whole_grid_was_tried(tmp_path):
    store, lora = Store(tmp_path), study()
    for done, spec in enumerate(lora.tries(), 1):
        put(store, spec, 0.5)
        assert len(lora.repeats(store)) == (2 if done == 3 else 0)
    assert {spec.seed for spec in lora.repeats(store)} == {1, 2}


def test_only_names_tasks_methods_or_both():
    studies = [study("lora", "words"), study("full", "words"), study("lora", "signs")]
    assert select(studies, None) == studies
    assert select(studies, "lora") == [studies[0], studies[2]]
    assert select(studies, "words/full, signs") == studies[1:]
    with pytest.raises(RequestError, match="'lroa' is none of"):
        select(studies, "lroa")


@pytest.fixture
def bench(tmp_path):
    ran = []

    def run(spec, work, line):
        if len(ran) == 2 and spec.seed == 0:
            ran.append("crash")
            raise KeyboardInterrupt
        ran.append((spec.method, spec.hyper["learning_rate"], spec.seed))
        return {"dev": {"accuracy": 0.5}, "test": {"accuracy": 0.25}}

    def render(studies, store):
        return f"{sum(s.finished(store) for s in studies)} cells"

    made = Benchmark("bench", "A bench.", lambda quick: [study(), study("full")], run, render)
    places = [f"--{name}={tmp_path / name}" for name in ("cells", "results", "work")]
    return made, ran, places, tmp_path / "results"


def test_an_interrupted_run_goes_on_with_the_first_missing_cell(bench, capsys):
    made, ran, places, results = bench
    with pytest.raises(KeyboardInterrupt):
        main(made, places)
    assert "2 cells" in results.read_text()  # what was finished is shown
    assert main(made, places) == 0
    finished = [entry for entry in ran if entry != "crash"]
    assert len(finished) == len(set(finished)) == 10
    assert "10 cells" in results.read_text()
    assert main(made, places) == 0
    assert len(ran) == 11  # nothing was run again
    assert "0 cells run, 0 to go" in capsys.readouterr().out


def test_a_stopped_training_ends_with_the_code_of_its_signal_and_leaves_no_cell(bench, capsys):
    made, _, places, results = bench

    def stopped(spec, work, line):
        raise TrainingInterrupted(15, 7, None)

    assert main(dataclasses.replace(made, run=stopped), places) == 143
    assert "the same command goes on" in capsys.readouterr().err
    assert not list((results.parent).glob("cells/*"))


def test_no_cell_is_begun_after_the_time_that_was_given(bench, capsys):
    made, ran, places, _ = bench
    assert main(made, [*places, "--minutes", "0.00001"]) == 0
    assert len(ran) <= 1
    assert "minutes are over" in capsys.readouterr().err


def test_only_and_list_and_render_run_no_more_than_asked(bench, capsys):
    made, ran, places, _ = bench
    assert main(made, [*places, "--list"]) == 0
    assert main(made, [*places, "--render"]) == 0
    assert ran == []
    assert "words/lora" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        main(made, [*places, "--only", "full"])
    assert {entry[0] for entry in ran if entry != "crash"} == {"full"}
    assert main(made, [*places, "--only", "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err


def test_a_cell_records_command_machine_and_threads(bench):
    made, _, places, results = bench
    with pytest.raises(KeyboardInterrupt):
        main(made, places)
    cell = Store(results.parent / "cells").get(study().tries()[0])
    assert cell.conditions["command"].startswith("python benchmarks/bench.py --threads ")
    for fact in ("machine", "torch", "transformers", "cores", "threads", "seconds", "load", "date", "deltatune"):
        assert cell.conditions[fact] is not None, fact
