"""`deltatune data check`: the report at 80 columns, as JSON, its exit codes; and the data settings of `train`."""

from __future__ import annotations

import json

import pytest

from tests.data.test_chat import PLAIN, TWO


@pytest.fixture(scope="session")
def talks(tmp_path_factory):
    file = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    rows = [{"messages": TWO}, {"messages": TWO[1:3]}] * 4
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_check_tells_what_is_learnt_at_80_columns(run, chatty, talks):
    done = run("data", "check", talks, "--model", chatty, "--samples", "1", "--packing", "--max_length=32")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert max(len(line) for line in lines if not line.startswith("warning")) <= 80
    assert "task        chat" in done.out
    assert "+  blue dog [end]" in lines and "+  small bird sings [end]" in lines
    assert any("█" in line for line in lines)
    assert any(line.startswith("packs") for line in lines)
    assert "warning: train: 6 rows are there already, such as lines 1, 3, 5, 7" in done.out
    assert lines[-1].startswith("no faulty row; ")


def test_the_same_as_json(run, chatty, talks):
    done = run("data", "check", talks, f"--model={chatty}", "--json", "--eval_split=0.25")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["task"] == "chat"
    assert [(part["name"], part["rows"]) for part in found["parts"]] == [("train", 6), ("eval", 2)]
    assert found["leaks"][0]["same_inputs"] == 2


def test_colours_mark_what_is_learnt_on_a_terminal(talks, chatty):
    from io import StringIO

    from rich.console import Console

    from deltatune.cli.data import _show
    from deltatune.data import check

    out = Console(file=StringIO(), force_terminal=True, width=80, color_system="standard")
    _show(check(str(talks), model=str(chatty), samples=1), out)
    told = out.file.getvalue()
    green = [part.split("\x1b")[0] for part in told.split("\x1b[1;32m")[1:]]
    assert [text.strip() for text in green[:2]] == ["blue dog [end]", "small bird sings [end]"]


def test_faulty_rows_end_in_code_3_and_are_all_told(run, tmp_path, t5):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"input": "red", "target": "cat"}\n{"input": "red", "tarjet": "cat"}\n{"input": \n')
    done = run("data", "check", path, "--model", t5)
    assert done.code == 3
    assert f"fault: {path} line 2: field 'target' is missing" in done.out
    assert "did you mean 'tarjet'?" in done.out
    assert f"fault: {path} line 3: malformed JSON" in done.out
    assert done.out.splitlines()[-1].startswith("2 faulty rows; ")
    assert "Traceback" not in done.out + done.err


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("data", "check"), 2, "no data is given"),
        (("data", "check", "none.jsonl"), 3, "does not exist"),
        (("data", "check", "r.jsonl", "--train_file=r.jsonl"), 2, "given both alone and with --train_file"),
        (("data", "check", "r.jsonl", "--max_lenth=3"), 2, "did you mean 'max_length'?"),
        (("data", "check", "r.jsonl", "--column", "prompt"), 2, "expected NAME=NAME_IN_THE_FILE"),
        (("data", "chek"), 2, "chek"),
        (("train", "--train_file=r.jsonl", "--packing=true", "--task=ner"), 2, "only causal models can be packed"),
        (("train", "--train_file=r.jsonl", "--train_on=last", "--task=causal"), 2, "it is for task chat"),
        (("train", "--train_file=r.jsonl", "--task=qa", "--truncation=left"), 2, "cuts by its own rule"),
    ],
)
def test_what_cannot_be_is_one_line_and_a_code(refused, words, code, told):
    assert told in refused(code, *words)


def test_columns_are_named_one_by_one_or_together(run, tmp_path, t5):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "red", "a": "cat", "target": 3}\n')
    for words in (["--column", "input=q", "--column", "target=a"], ["--column=input=q,target=a"],
                  ["column_mapping={input: q, target: a}"]):  # fmt: skip
        done = run("data", "check", path, "--model", t5, "--json", *words)
        assert done.code == 0, done.err
        assert json.loads(done.out)["parts"][0]["samples"][0]["pieces"][0][0].startswith("red")


def test_a_chat_is_trained_and_answers_through_its_template(run, chatty, talks, tmp_path):
    out = tmp_path / "out"
    done = run("train", f"--model={chatty}", f"--train_file={talks}", f"--train_file={talks}", "--max_steps=2",
               "--eval_split=0.25", "--num_threads=1", f"--output_dir={out}", "--max_target_length=4",
               "--packing", "--max_length=48")  # fmt: skip
    assert done.code == 0, done.err
    settings = json.loads((out / "settings.json").read_text())
    assert settings["task"] == "chat" and settings["train_file"] == [str(talks)] * 2
    assert (out / "chat_template.jinja").read_text() == PLAIN
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    answer = run("generate", out, "red cat", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["input"] == "red cat"
    plan = run("train", out / "settings.json", f"--output_dir={tmp_path / 'plan'}", "--dry-run")
    assert plan.code == 0, plan.err
    assert not (tmp_path / "plan").exists()
