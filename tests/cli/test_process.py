"""The command as a process of its own; and the verbs that say something about the installation."""

import json
import os
import subprocess
import sys


def python(code, *words):
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=300)


def test_help_loads_no_model_library():
    code = (
        "import sys\nfrom deltatune.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as e: assert e.code == 0\n"
        "print([n for n in ('transformers', 'accelerate', 'matplotlib', 'jinja2', 'pandas') if n in sys.modules])"
    )
    done = python(code)
    assert done.stdout.splitlines()[-1] in ("[]", "['jinja2']"), done.stderr  # some builds of torch import jinja2


def test_a_refusal_leaves_the_process_with_its_code_and_one_line(tmp_path):
    done = python("from deltatune.cli import main; main()", "inspect", tmp_path / "nowhere")
    assert done.returncode == 3
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


def test_version_and_env(run):
    import deltatune as package

    assert run("--version").out.split() == ["deltatune", package.__version__]
    found = json.loads(run("env", "--json").out)
    assert found["packages"]["deltatune"] == package.__version__
    assert found["processors"] == os.cpu_count()
    assert package.__version__ in run("env").out


def test_no_verb_at_all_shows_the_help(run):
    assert run().out == run("--help").out


def test_trace_of_the_built_in_example(run, tmp_path):
    done = run("trace", "--method", "lora", "--r", "2", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["active"] == ["default"]
    assert found["configs"][0]["fields"]["r"] == 2
    assert found["gradient"]["dead"] == 0


def test_trace_of_a_saved_adapter_writes_its_page(run, prefix, tmp_path):
    page = tmp_path / "trace.html"
    done = run("trace", prefix, "--text", "red cat", "--target", "cat red", "--html", page)
    assert done.code == 0, done.err
    assert "loss" in done.out
    assert page.read_text().startswith("<!doctype html>")
