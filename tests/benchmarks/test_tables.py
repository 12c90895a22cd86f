"""Tables are made from cells: spread over seeds, honest about what is missing, and put between markers."""

from __future__ import annotations

import classification
import pytest
from harness.cells import Cell, Spec, Store
from harness.studies import Study
from harness.tables import chosen_of, markdown, parameters, put_between, spread, update

from deltatune.errors import DataError


def test_spread_is_mean_sample_deviation_and_range():
    # mean 0.6; squared deviations 0.01 + 0 + 0.01, over n - 1 = 2: 0.01, its root 0.1
    assert spread([0.5, 0.6, 0.7]) == "0.600 ± 0.100 (0.500 to 0.700)"
    assert spread([12.34], 1) == "12.3"


def test_markdown_lines_up():
    assert markdown(("a", "b"), [("x", "1")]).splitlines() == ["| a | b |", "| --- | ---: |", "| x | 1 |"]


def test_only_what_is_between_the_markers_changes():
    text = "before\n<!-- begin a -->\nold\n<!-- end a -->\nmiddle\n<!-- begin b -->\n<!-- end b -->\nafter\n"
    assert put_between(text, "a", "new") == text.replace("old", "new")
    twice = put_between(put_between(text, "b", "x"), "b", "y")
    assert "x" not in twice and "\ny\n" in twice


@pytest.mark.parametrize(
    "text",
    ["no markers", "<!-- begin a -->", "<!-- end a --><!-- begin a -->", "<!-- begin a --><!-- end a -->" * 2],
)
def test_missing_or_doubled_markers_are_refused(text):
    with pytest.raises(DataError, match="begin a"):
        put_between(text, "a", "new", "results.md")


def test_update_leaves_an_equal_document_alone(tmp_path):
    path = tmp_path / "results.md"
    update(path, "a", "table")
    assert path.read_text() == "<!-- begin a -->\ntable\n<!-- end a -->\n"
    stamp = path.stat().st_mtime_ns
    update(path, "a", "table")
    assert path.stat().st_mtime_ns == stamp


def test_parameters_tell_their_share():
    assert parameters({"trainable_parameters": 1234, "all_parameters": 100_000}) == "1,234 (1.23%)"
    assert parameters({"trainable_parameters": 770}) == "770"


def filled(store, values):
    study = Study(Spec("b", "t", "lora", 0, {}, {}, {}), grid=(1e-3, 1e-4, 1e-2), seeds=(0, 1, 2))
    for spec, value in zip(study.tries(), values):
        store.put(Cell(spec, {"dev": {"accuracy": value}}, {}))
    return study


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ((), ""),
        ((0.5,), "0.001 of 0.001; 2 not tried yet"),
        ((0.6, 0.5, 0.4), "0.001 of 0.0001, 0.001, 0.01"),
        ((0.4, 0.5, 0.6), "0.01 (edge) of 0.0001, 0.001, 0.01"),
    ],
)
def test_the_choice_tells_an_unfinished_search_and_the_edge_of_the_grid(tmp_path, values, told):
    store = Store(tmp_path)
    assert chosen_of(filled(store, values), store) == told


def result(accuracy):
    scores = {"accuracy": accuracy, "macro_f1": accuracy - 0.1, "loss": 1.0}
    return {
        "dev": scores, "test": scores, "trainable_parameters": 1000, "all_parameters": 10_000, "steps": 400,
        "examples": 6400, "train_seconds": 60.0,
    }  # fmt: skip


CONDITIONS = {"machine": "m", "cores": 2, "threads": 1, "torch": "2", "load": [0.5, 1.0]}


def test_the_classification_table_shows_every_seed_count_and_budget(tmp_path):
    store, studies = Store(tmp_path), classification.studies()
    prefix = next(s for s in studies if s.label == "banking77/prefix")
    for spec, accuracy in zip(prefix.tries(), (0.8, 0.7, 0.6)):
        store.put(Cell(spec, result(accuracy), CONDITIONS))
    store.put(Cell(prefix.repeats(store)[0], result(0.9), {**CONDITIONS, "load": [3.0, 4.26]}))
    text = classification.render(studies, store)
    assert "4 of 36 cells are there." in text
    row = next(line for line in text.splitlines() if line.startswith("| prefix tuning"))
    for part in ("1,000 (10.00%)", "2 of 3", "0.850 ± 0.071 (0.800 to 0.900)", "0.750 ± 0.071", "400 x 16"):
        assert part in row, part
    assert "6,400 training rows, 400 steps of 16 rows" in text
    assert "Measured on m, 2 cores, with 1 threads of torch 2, under a load of 0.5 to 4.3" in text
    assert text.count("No cell yet.") == 1  # the other task


def test_every_trained_method_gets_as_many_tries_the_same_budget_and_seeds():
    studies = classification.studies()
    assert {len(s.grid) for s in studies} == {3}
    assert len({str(s.spec.budget) for s in studies}) == 1
    assert {s.seeds for s in studies if s.spec.method != "probe"} == {(0, 1, 2)}
    quick = classification.studies(quick=True)
    assert not {s.name for study in studies for s in study.tries()} & {s.name for study in quick for s in study.tries()}
