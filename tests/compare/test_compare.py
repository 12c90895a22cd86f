"""`compare`: cells, what is kept of them, the table, and what is refused."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deltatune.cli.app import app
from deltatune.compare import compare
from deltatune.compare.cell import read
from deltatune.errors import ConfigError, DataError


def told(comparison):
    return json.loads((comparison.output / "compare.json").read_text())


def test_candidates_are_ranked_by_what_the_rows_say(shared, tiny):
    slow = {"method": "lora", "name": "slow", "learning_rate": 1e-6}
    found = compare(
        shared, ["lora", slow], seeds=2, forget_file=str(tiny / "other.jsonl"), isolate=False, one_pass="never"
    )
    facts = told(found)
    assert [line["name"] for line in facts["candidates"]] == ["lora", "slow"]
    fast, kept = facts["candidates"]
    assert fast["score"]["mean"] < kept["score"]["mean"]
    assert fast["trainable_parameters"] == kept["trainable_parameters"] > 0 and fast["adapter_bytes"] > 0
    assert abs(kept["forgetting"]) < 1e-4 < abs(fast["forgetting"])  # at such a rate nothing has changed
    assert (found.output / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "| slow |" in (found.output / "compare.md").read_text()
    # the mean over rows is the loss of the run's own evaluation
    assert fast["score"]["mean"] == pytest.approx(fast["loss"], rel=1e-5)


def test_a_second_comparison_runs_only_what_is_new(shared, monkeypatch):
    compare(shared, ["lora", "ia3"], seeds=2, isolate=False, one_pass="never")
    ran = []
    from deltatune.compare import cells

    true = cells.cell.run_cell
    monkeypatch.setattr(cells.cell, "run_cell", lambda spec: ran.append((spec.run.method, spec.run.seed)) or true(spec))
    compare(shared, ["lora", "ia3"], seeds=3, isolate=False, one_pass="never")
    assert ran == [("lora", 44), ("ia3", 44)]
    Path(shared["train_file"]).touch()
    compare({**shared, "max_steps": 3}, ["lora", "ia3"], seeds=2, isolate=False, one_pass="never")
    assert len(ran) == 6  # other settings, other cells


def test_one_seed_cannot_decide(shared):
    said = []
    found = compare(shared, ["lora", "ia3"], seeds=1, isolate=False, one_pass="never", say=said.append)
    assert any("cannot decide: one seed" in line for line in said)
    assert told(found)["pairs"] == [] and found.summary.verdict[0].startswith("Cannot decide: one seed")


def test_a_candidate_that_fails_is_told_and_the_others_are_compared(shared):
    wild = {"method": "full", "name": "wild", "learning_rate": 900.0, "max_grad_norm": 0.0, "warmup_ratio": 0.0}
    found = compare(shared, ["lora", "ia3", wild], seeds=2, isolate=False, one_pass="never")
    assert "TrainError" in found.summary.failed["wild"]
    assert {line.name for line in found.summary.lines} == {"lora", "ia3"}


def test_the_same_rows_are_held_out_whatever_the_seed(shared, tiny):
    values = {name: value for name, value in shared.items() if name != "test_file"}
    classes = {**values, "model_name_or_path": str(tiny / "bert"), "train_file": str(tiny / "labelled.jsonl")}
    said = []
    found = compare(
        {**classes, "eval_split": 0.5}, ["lora", "ia3"], seeds=2, isolate=False, say=said.append, one_pass="never"
    )
    assert any("accuracy over 40 held-out rows" in line for line in said)
    for line in found.summary.lines:
        for seed, mean in zip(found.plan.seeds, line.by_seed):
            folder = found.output / "cells" / line.name / f"seed-{seed}"
            metrics = json.loads((folder / "metrics.json").read_text())
            assert metrics["after"]["eval"]["accuracy"] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("candidates", "own", "names"),
    [
        (["lora"], {}, "two or more"),
        (["lora", "lora"], {}, "twice"),
        (["lora", {"method": "ia3", "name": "lora"}], {}, "twice"),
        (["lora", "lorra"], {}, "did you mean 'lora'"),
        (["lora", {"r": 4}], {}, "names no method"),
        (["lora", {"method": "ia3", "train_file": "x"}], {}, "the same for all"),
        (["lora", "ia3"], {"seeds": [1, 1]}, "seeds"),
        (["lora", "ia3"], {"metric": "f1"}, "metric"),
        (["lora", "ia3"], {"one_pass": "perhaps"}, "one_pass"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_model_is_loaded(shared, candidates, own, names):
    with pytest.raises(ConfigError, match=names):
        compare({**shared, "model_name_or_path": "/nowhere"}, candidates, isolate=False, **own)
    assert not Path(shared["output_dir"]).exists()


def test_rows_are_checked_before_the_model_is_loaded(shared, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"input": "red"}\n')
    with pytest.raises(DataError, match="bad"):
        compare({**shared, "model_name_or_path": "/nowhere", "test_file": str(tmp_path / "bad.jsonl")}, ["lora", "ia3"])


def test_options_for_all_go_to_those_that_take_them(shared):
    from deltatune.compare.plan import CompareSettings, make_plan

    plan = make_plan(CompareSettings(candidates="lora,ia3", learning_rates="1e-3,1e-2"), {**shared, "r": 4})
    assert [c.name for c in plan.candidates] == ["lora lr=0.001", "lora lr=0.01", "ia3 lr=0.001", "ia3 lr=0.01"]
    assert plan.candidates[0].settings.method_options["r"] == 4
    with pytest.raises(ConfigError, match="num_virtual_tokens"):
        make_plan(CompareSettings(candidates="lora,ia3"), {**shared, "num_virtual_tokens": 4})


@pytest.mark.slow
def test_the_verb_takes_a_file_and_runs_cells_in_processes(shared, tmp_path):
    import yaml

    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**shared, "max_steps": 1, "candidates": ["lora", "ia3"]}))
    done = CliRunner().invoke(
        app, ["compare", str(tmp_path / "run.yaml"), "--seeds", "1", "--one_pass=never", "--json"]
    )
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert {line["name"] for line in facts["candidates"]} == {"lora", "ia3"}
    assert all(line["peak_memory_bytes"] > 0 for line in facts["candidates"])


def test_a_broken_result_is_no_result(tmp_path):
    (tmp_path / "cell.json").write_text("{")
    assert read(tmp_path, "key") is None


def test_one_pass_finds_what_lone_runs_find_and_leaves_adapters_that_load(shared, tiny):
    given = ["lora", {"method": "lora", "r": 2}, "ia3"]
    own = {"seeds": 2, "isolate": False, "forget_file": str(tiny / "other.jsonl")}
    alone = compare({**shared, "lora_dropout": 0.0}, given, one_pass="never", **own)
    said = []
    folder = Path(shared["output_dir"]).with_name("at-once")
    at_once = compare(
        {**shared, "lora_dropout": 0.0, "output_dir": str(folder)}, given, one_pass="always", say=said.append, **own
    )
    assert sum("in one pass" in line for line in said) == 2
    for one, other in zip(alone.summary.lines, at_once.summary.lines):
        assert one.name == other.name and one.by_seed == pytest.approx(other.by_seed, abs=1e-5)
        assert one.forgetting == pytest.approx(other.forgetting, abs=1e-5)
        assert one.adapter_bytes == pytest.approx(other.adapter_bytes, rel=0.02)
        assert (one.trainable_parameters, one.total_parameters) == (other.trainable_parameters, other.total_parameters)
        assert (one.together, other.together) == (1, 3)
    from deltatune import PeftModel
    from deltatune.train.base import load_base

    settings = at_once.plan.shared
    PeftModel.from_pretrained(load_base(settings).model, str(folder / "cells" / "ia3" / "seed-42"))


@pytest.mark.slow
def test_auto_measures_each_candidate_by_itself_first(shared, monkeypatch):
    from deltatune.compare import trial

    monkeypatch.setattr(trial, "_lone_seconds", lambda *run: 1e9)  # however busy the machine is, one pass is faster
    found = compare(shared, ["lora", "ia3", "full"], seeds=3, isolate=False)
    together = {place: result.together for place, result in found.results.items()}
    assert {place for place, count in together.items() if count == 1} == {
        ("lora", 42), ("ia3", 42), ("full", 42), ("full", 43), ("full", 44),
    }  # fmt: skip
    assert all(line.together == 1 for line in found.summary.lines)
    monkeypatch.setattr(trial, "_lone_seconds", lambda *run: 1e-9)
    said = []
    compare({**shared, "max_steps": 3}, ["lora", "ia3"], seeds=2, isolate=False, say=said.append)
    assert any("times as long" in line for line in said)
