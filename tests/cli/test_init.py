"""`deltatune init`, `config-schema` and completion, as a shell sees them."""

import json
import os
import subprocess
import sys

import yaml


def test_a_recipe_is_trained_from_as_it_stands(run, bert, labelled, tmp_path):
    file = tmp_path / "run.yaml"
    done = run("init", "classification", "--method", "lora", "-o", file)
    assert done.code == 0, done.err
    words = [f"model_name_or_path={bert}", f"train_file={labelled}", f"output_dir={tmp_path / 'out'}", "max_length=16"]
    planned = run("train", file, *words, "--dry-run")
    assert planned.code == 0, planned.err
    assert "lora" in planned.out and "22 rows" in planned.out


def test_stdout_is_the_file(run):
    out = run("init", "chat", "--method", "prefix").out
    assert yaml.safe_load(out)["method"] == "prefix_tuning"
    assert out.startswith("# ")


def test_the_list_has_all_tasks_and_methods_at_80_columns(run):
    from deltatune.recipes import TASKS
    from deltatune.train.method import method_names

    for words in (["init"], ["init", "--list"]):
        out = run(*words).out
        first = {line.split(" ")[0] for line in out.splitlines()}
        assert {*TASKS, *method_names()} <= first
        assert max(map(len, out.splitlines())) <= 80


def test_mistakes_are_answered_with_the_nearest_and_nothing_is_overwritten(refused, tmp_path):
    assert "classification" in refused(2, "init", "clasification")
    assert "prefix_tuning" in refused(2, "init", "chat", "--method", "prefix_tunin")
    file = tmp_path / "run.yaml"
    file.write_text("mine")
    assert "already" in refused(2, "init", "chat", "-o", file)
    assert file.read_text() == "mine"


def test_the_schema_is_json(run, tmp_path):
    file = tmp_path / "schema.json"
    assert run("config-schema", "-o", file).code == 0
    assert json.loads(file.read_text()) == json.loads(run("config-schema").out)


def test_every_help_fits_80_columns():
    from typer.testing import CliRunner

    from deltatune.cli.app import app

    for words in ([], ["init"], ["eval"], ["chat"], ["generate"], ["config-schema"]):
        done = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
        assert done.exit_code == 0
        assert max(map(len, done.output.splitlines())) <= 80


def test_the_shell_completes_verbs_and_methods():
    def completed(*words):
        line = "deltatune " + " ".join(words)
        environment = {
            **os.environ,
            "_DELTATUNE_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words)),
        }
        code = "from deltatune.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        return done.stdout.split()

    assert completed("ch") == ["chat"]
    assert "prefix_tuning" in completed("init", "chat", "--method", "pre")
