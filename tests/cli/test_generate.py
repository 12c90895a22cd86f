"""`deltatune generate`: the answers are those of the model and its adapter."""

import json

import pytest
import torch

INPUTS = ["red cat dog", "sun", "blue sea"]


def by_hand(folder, base, texts, adapter):
    """What transformers' own generate answers, one input at a time."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from deltatune import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), folder).eval()
    found = []
    for text in texts:
        inputs = {k: v for k, v in tokenizer(text, return_tensors="pt").items() if k in ("input_ids", "attention_mask")}
        if adapter:
            ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        else:
            with model.disable_adapter():
                ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        found.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    return found


@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_answers_and_base_are_those_of_the_model(run, request, t5, name):
    folder = request.getfixturevalue(name)
    done = run("generate", folder, *INPUTS, "--json", "--compare")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["input"] for row in rows] == INPUTS
    assert [row["output"] for row in rows] == by_hand(folder, t5, INPUTS, adapter=True)
    assert [row["base"] for row in rows] == by_hand(folder, t5, INPUTS, adapter=False)


def test_arguments_stdin_and_file_are_the_same_inputs(run, lora, tmp_path):
    file = tmp_path / "inputs.csv"
    file.write_text("\n".join(["id,text", *(f"{i},{text}" for i, text in enumerate(INPUTS))]) + "\n")
    one = run("generate", lora, *INPUTS)
    two = run("generate", lora, stdin="\n".join(INPUTS) + "\n")
    three = run("infer", lora, "--file", file)
    assert one.code == two.code == three.code == 0
    assert one.out == two.out == three.out
    assert len(one.out.splitlines()) == len(INPUTS)


def test_output_goes_to_a_file(run, lora, tmp_path):
    file = tmp_path / "answers.jsonl"
    assert run("generate", lora, *INPUTS, "-o", file).out == ""
    assert [json.loads(line)["input"] for line in file.read_text().splitlines()] == INPUTS


def test_sampling_is_repeated_by_its_seed(run, lora):
    words = ["generate", lora, *INPUTS, "--sample", "--temperature", "2.0", "--max_new_tokens", "12"]
    one, same, other = (run(*words, "--seed", seed).out for seed in ("1", "1", "2"))
    assert one == same != other


def test_length_and_beams_are_obeyed(run, lora):
    rows = run("generate", lora, "red cat", "--json", "--max-new-tokens", "2", "--num-beams", "3").out
    assert len(json.loads(rows)["output"].split()) <= 2


def test_a_classifier_answers_with_its_labels(run, classifier):
    done = run("generate", classifier, "red cat", "sun gold", "--json", "--compare")
    assert done.code == 0, done.err
    for line in done.out.splitlines():
        row = json.loads(line)
        assert row["output"] in ("animal", "sky")
        assert 0.5 <= row["probability"] <= 1


def test_a_fully_trained_model_is_compared_with_what_it_was(run, usual, t5, tmp_path):
    words = [*usual, "method=full", "--lr=0.05", f"--output_dir={tmp_path / 'full'}"]
    assert run("train", *words).code == 0
    done = run("generate", tmp_path / "full", *INPUTS, "--compare", "--json")
    assert done.code == 0, done.err
    base = [
        json.loads(line)["output"]
        for line in run("generate", t5, *INPUTS, "--json", "--max-new-tokens=6").out.splitlines()
    ]
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["base"] for row in rows] == base
    assert [row["output"] for row in rows] != base


def test_a_plain_model_answers_too(run, t5):
    torch.manual_seed(0)
    assert run("generate", t5, "red cat", "--max_new_tokens", "3").code == 0


def test_bad_requests_are_refused(refused, lora, tmp_path):
    assert "--sample" in refused(2, "generate", lora, "red", "--temperature", "0.5")
    assert "no input" in refused(3, "generate", lora, stdin="\n")
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "red"}\n{"text": ""}\n')
    assert "line 2" in refused(3, "generate", lora, "--file", file)
    assert "--column" in refused(3, "generate", lora, "--file", _write(tmp_path / "x.csv", "foo,bar\n1,2\n"))


def _write(path, text):
    path.write_text(text)
    return path


def test_brackets_of_the_data_are_shown_and_not_read_as_markup(capsys):
    from deltatune.cli.show import console, facts, table

    out = console()
    out.print(facts([("input", "name[The Mill], eatType[pub]")]))
    out.print(table(("a",), [("area[riverside]",)]))
    shown = capsys.readouterr().out
    assert "eatType[pub]" in shown and "area[riverside]" in shown


def test_several_columns_and_lists_of_words_make_one_input(tmp_path):
    from deltatune.cli.generate import rows_of
    from deltatune.errors import DataError

    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "who?", "context": "a cat", "tokens": ["a", "cat"], "tags": [1, 2]}) + "\n")
    assert list(rows_of(str(file), "question,context")) == ["who?\na cat"]
    assert list(rows_of(str(file), "tokens")) == ["a cat"]
    for column in ("question,answer", "tags"):
        with pytest.raises(DataError, match=r"line 1: field '(answer|tags)' is (missing or empty|not text)"):
            list(rows_of(str(file), column))
