"""Faults around the command: closed pipes, odd locales, missing packages, random words. Numbers of the fault matrix."""

import os
import random
import subprocess
import sys

import pytest

from deltatune.cli.failures import explain

MAIN = "import sys; from deltatune.cli import main; main(sys.argv[1:])"

# 85 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="pipes are POSIX's")
@pytest.mark.parametrize("words", [["--help"], ["env", "--json"]])
def test_a_reader_that_stops_early_gets_no_traceback(words):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", MAIN, *words], stdout=writing, stderr=subprocess.PIPE, timeout=120)
    os.close(writing)
    assert b"Traceback" not in done.stderr and b"internal error" not in done.stderr, done.stderr
    assert done.returncode in (0, 1, 141)


@pytest.mark.skipif(os.name != "posix", reason="names of bytes are POSIX's")
def test_odd_locales_and_paths(tmp_path):
    name = os.fsencode(tmp_path) + b"/n\xff\xc3\xa4\nx"
    os.mkdir(name)
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "inspect", name], capture_output=True, env=environment, timeout=120
    )
    assert done.returncode == 3, done.stderr
    assert b"Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


# 86 ------------------------------------------------------------------------------------------------------------------


def test_a_package_that_is_missing_is_named():
    code, text = explain(ModuleNotFoundError("No module named 'wandb'", name="wandb"))
    assert code == 4 and "wandb" in text and "pip install" in text


# 87 ------------------------------------------------------------------------------------------------------------------

VERBS = ["train", "generate", "inspect", "doctor", "diff", "tain", "--version", ""]
WORDS = [
    *("--json", "--tensors", "--config", "--file", "--output", "--max-new-tokens", "--num-beams", "--top-p", "--for"),
    *("--r", "--learning_rate", "--train_file", "--model", "--nope", "-z", "-", "--", "=", "--=", "--r=", "lr=", "\0"),
    *("nan", "-1", "1e999", "0x", "[", "{", "null", "../..", "/dev/null", "/", "\u202e", "\x1b[31m", "é" * 300, "%s%n"),
]


def ends_well(run, seed):
    choose = random.Random(seed)
    words = [choose.choice(VERBS), *(choose.choice(WORDS) for _ in range(choose.randint(0, 5)))]
    done = run(*words, stdin="")
    assert done.code in (0, 2, 3, 4), (words, done.err)
    assert "Traceback" not in done.out + done.err and "internal error" not in done.err, (words, done.err)
    assert done.code == 0 or len(done.lines) + done.out.startswith("problem: ") == 1, (words, done.out, done.err)


def test_random_arguments_end_in_a_code_and_one_line(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(100):
        ends_well(run, seed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_ten_thousand_random_arguments(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(10_000):
        ends_well(run, 1000 + seed)
    assert list(tmp_path.iterdir()) == []
