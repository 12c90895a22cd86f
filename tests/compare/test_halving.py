"""Early stopping of losers, and the search that proposes candidates."""

import sys
from pathlib import Path

import pytest

from deltatune.compare import compare, search
from deltatune.compare.halving import halve
from deltatune.compare.leg import Leg
from deltatune.compare.search import _suggest
from deltatune.errors import ConfigError


def halved(losses, least=2):
    """`losses`: of each candidate after a quarter and after half of 100 steps; None where it failed."""
    ran = []

    def run(name, share):
        ran.append((name, share))
        loss = losses[name][0 if share == 0.25 else 1]
        return None if loss is None else Leg(int(100 * share), loss)

    return halve(list(losses), run, lambda text: None, least), ran


FIVE = {"a": (3.0, 1.0), "b": (1.0, 3.0), "c": (2.0, 2.0), "d": (9.0, 0.1), "e": (5.0, 0.1)}


def test_the_worse_half_is_stopped_and_the_others_are_judged_again():
    found, ran = halved(FIVE)
    assert found.alive == ["a", "c"]
    assert {name: loser.step for name, loser in found.losers.items()} == {"d": 25, "e": 25, "b": 50}
    assert [name for name, share in ran if share == 0.5] == ["a", "b", "c"]  # a loser costs no more steps
    assert found.losers["e"].loss == 5.0 and found.losers["e"].needed == pytest.approx(3.0 * 1.01)


def test_the_order_of_the_candidates_decides_nothing():
    found, _ = halved(dict(reversed(FIVE.items())))
    assert sorted(found.alive) == ["a", "c"] and set(found.losers) == {"b", "d", "e"}


def test_one_that_is_as_good_as_the_last_that_goes_on_goes_on():
    found, _ = halved({"a": (1.0, 1.0), "b": (2.0, 2.0), "c": (2.01, 2.01), "d": (3.0, 3.0)})
    assert found.alive == ["a", "b", "c"] and list(found.losers) == ["d"]


def test_one_that_fails_is_no_loser_and_takes_no_place():
    found, _ = halved({"a": (1.0, 1.0), "b": (None, None), "c": (2.0, 2.0)})
    assert found.failed == ["b"] and found.alive == ["a", "c"] and not found.losers


CANDIDATES = [
    "ia3",
    {"method": "lora", "name": "none", "learning_rate": 1e-7},
    {"method": "lora", "name": "fast"},
    {"method": "lora", "name": "small", "learning_rate": 1e-6},
]


def test_losers_are_named_and_winners_are_those_of_whole_runs(shared):
    shared = {**shared, "max_steps": 16, "lora_dropout": 0.1, "learning_rate": 3e-2}
    own = {"seeds": 2, "isolate": False, "one_pass": "never"}
    found = compare(shared, CANDIDATES, stop_losers=True, **own)
    stopped = found.summary.stopped
    assert {name: one.step for name, one in stopped.items()} == {"none": 4, "small": 4}
    assert all(one.loss > one.needed for one in stopped.values())
    table = (found.output / "compare.md").read_text()
    assert "| none | stopped at step 4: eval loss" in table
    folder = Path(shared["output_dir"]).with_name("whole")
    whole = compare({**shared, "output_dir": str(folder), "eval_split": 0.2}, CANDIDATES, **own)
    for name in ("fast", "ia3"):
        for seed in (42, 43):
            assert found.results[name, seed].rows == whole.results[name, seed].rows  # to the bit, dropout and all
            assert found.results[name, seed].steps == 16
    assert not list(found.output.rglob("checkpoint-*"))


def test_a_second_time_nothing_is_trained_again(shared, monkeypatch):
    own = {"seeds": 1, "isolate": False, "one_pass": "never", "stop_losers": True}
    first = compare({**shared, "learning_rate": 3e-2}, CANDIDATES[:3], **own)
    monkeypatch.setattr("deltatune.compare.leg.train", None)
    monkeypatch.setattr("deltatune.compare.cell.train", None)
    again = compare({**shared, "learning_rate": 3e-2}, CANDIDATES[:3], **own)
    assert again.summary.stopped == first.summary.stopped and again.results == first.results


def test_a_search_proposes_within_its_ranges_and_compares_the_best(shared, monkeypatch):
    monkeypatch.setattr(search, "GENERATION", 4)
    monkeypatch.setattr(search, "FINALISTS", 2)
    space = {"learning_rate": [1e-7, 3e-2], "r": {"low": 2, "high": 8}}
    own = {"seeds": 1, "isolate": False, "one_pass": "never", "search": space, "trials": 8}
    shared, said = {**shared, "max_steps": 16}, []
    found = compare(shared, ["lora"], say=said.append, **own)
    alive = {candidate.name: candidate.settings for candidate in found.plan.candidates}
    assert alive and {settings.learning_rate for settings in alive.values()} == {3e-2}
    assert all(2 <= settings.method_options["r"] <= 8 for settings in alive.values())
    assert any("learning_rate=1e-07" in name for name in found.summary.stopped)
    assert any("8 of 8 tried; best so far: lora learning_rate=0.03" in line for line in said)
    again = compare(shared, ["lora"], **own)
    assert [one.name for one in again.plan.candidates] == list(alive)  # the same proposals, found in their folders


def test_a_narrow_range_is_not_left_by_rounding():
    optuna = pytest.importorskip("optuna", reason="optuna, which proposes, is not installed")
    space, study = {"low": 0.12345, "high": 0.12355}, optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = [_suggest(study.ask(), "learning_rate", space) for _ in range(20)]
    assert all(0.12345 <= value <= 0.12355 and float(f"{value:g}") == value for value in found)


def test_a_search_without_optuna_says_what_to_do(shared, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"deltatune\[search\]"):
        compare(shared, ["lora"], search={"r": [2, 4]}, isolate=False)
    assert not Path(shared["output_dir"]).exists()


@pytest.mark.parametrize(
    ("own", "names"),
    [
        ({"search": {"r": []}}, "no range"),
        ({"search": {"learning_rate": {"low": 1.0}}}, "low and high"),
        ({"search": {"learning_rate": {"low": 0.0, "high": 1.0, "log": True}}}, "above 0"),
        ({"search": {"learning_rate": {"low": 1.0, "high": float("inf")}}}, "no range"),
        ({"search": {"learning_rate": {"low": 1.0, "high": 2.0, "log": "false"}}}, "log: true"),
        ({"search": {"num_virtual_tokens": [4]}}, "no candidate takes num_virtual_tokens"),
        ({"search": {"seed": [1, 2]}}, "the same for all"),
        ({"stop_losers": True, "one_pass": "always"}, "one_pass"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_the_model_is_loaded(shared, own, names):
    with pytest.raises(ConfigError, match=names):
        compare({**shared, "model_name_or_path": "/nowhere"}, ["lora", "ia3"], isolate=False, **own)
    assert not Path(shared["output_dir"]).exists()


def test_evaluations_of_their_own_and_stopping_do_not_go_together(shared):
    with pytest.raises(ConfigError, match="load_best_model_at_end"):
        compare({**shared, "load_best_model_at_end": True}, ["lora", "ia3"], stop_losers=True, isolate=False)


@pytest.mark.slow
def test_legs_in_processes_of_their_own(shared):
    found = compare({**shared, "max_steps": 16, "learning_rate": 3e-2}, CANDIDATES[:3], stop_losers=True, seeds=1)
    assert {name: one.step for name, one in found.summary.stopped.items()} == {"none": 4}
    assert {candidate.name for candidate in found.plan.candidates} == {"ia3", "fast"}
