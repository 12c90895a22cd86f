"""`deltatune eval`: base and adapters on one base; scores are those of each alone."""

import json
import math

import pytest

from deltatune.scoring import evaluate_adapters


@pytest.fixture(scope="module")
def found(lora, prefix, rows):
    """Two adapters of different methods and the base, on all rows."""
    return evaluate_adapters([str(lora), f"short={prefix}"], str(rows), forgetting="builtin", draws=200)


def by_hand(folder, base, rows, adapter):
    """Mean loss per token of transformers' model, row by row, and its greedy answers."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from deltatune import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(base)
    model = (PeftModel.from_pretrained(model, folder) if adapter else model).eval()
    total = count = hits = 0
    for row in rows:
        inputs, labels = (tokenizer(row[name], return_tensors="pt").input_ids for name in ("input", "target"))
        with torch.no_grad():
            total += float(model(input_ids=inputs, labels=labels).loss) * labels.shape[1]
            said = model.generate(input_ids=inputs, max_new_tokens=6, do_sample=False)
        count += labels.shape[1]
        hits += tokenizer.decode(said[0], skip_special_tokens=True).strip() == row["target"]
    return total / count, hits / len(rows)


def test_scores_of_each_are_those_of_it_alone(found, t5, lora, prefix, rows):
    read = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [one.name for one in found.models] == ["base", "lora", "short"]
    assert (found.task, found.rows) == ("seq2seq", len(read))
    for one, folder in zip(found.models, (lora, lora, prefix)):
        loss, exact = by_hand(folder, t5, read, adapter=one.name != "base")
        assert one.scores["loss"].value == pytest.approx(loss, rel=1e-5)
        assert one.scores["perplexity"].value == pytest.approx(math.exp(loss), rel=1e-5)
        assert one.scores["exact_match"].value == pytest.approx(exact)
        assert one.scores["loss"].low < loss < one.scores["loss"].high


@pytest.mark.parametrize("task", ["classification", "token_classification", "question_answering", "causal", "chat"])
def test_scores_of_every_task_are_those_its_run_told(task, request, tmp_path):
    """`train` has scored its adapter on the same rows by other code: row by row there, by sums here."""
    from tests.cli.conftest import WORDS, trained
    from tests.data.test_chat import WORDS as CHAT_WORDS

    model = request.getfixturevalue("chatty" if task in ("causal", "chat") else "bert")
    words = CHAT_WORDS if task in ("causal", "chat") else WORDS
    rows = _rows_of(task, words)
    for name, part in (("train", rows), ("dev", rows[3:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    folder = trained(
        tmp_path / "run",
        *(f"--model={model}", f"--train_file={tmp_path / 'train.jsonl'}", f"--eval_file={tmp_path / 'dev.jsonl'}"),
        *(f"--task={task}", "--method=lora", "--lr=0.02", "--max_steps=6", "--max_target_length=6", "--num_threads=1"),
        *("--max_length=24", "--eval_before=false", "--init_lora_weights=false"),
    )
    told = json.loads((folder / "metrics.json").read_text())["after"]["eval"]
    found = evaluate_adapters([str(folder)], base=False, draws=20).models[0]  # by default what the run was evaluated on
    assert told.keys() <= found.scores.keys() and len(told) >= 3
    assert {name: found.scores[name].value for name in told} == pytest.approx(told, rel=1e-4)


def _rows_of(task, words):
    import random

    rng = random.Random(0)
    made = []
    for number in range(12):
        text = rng.sample(words, 3)
        if task == "classification":
            made.append({"text": " ".join(text), "label": "even" if number % 2 else "odd"})
        elif task == "token_classification":
            made.append({"tokens": text, "tags": [rng.choice(["O", "B-thing", "I-thing"]) for _ in text]})
        elif task == "question_answering":
            answer = {"text": text[1], "start": len(text[0]) + 1}
            made.append({"question": rng.choice(words), "context": " ".join(text), "answers": [answer]})
        elif task == "chat":
            said = [{"role": "user", "content": " ".join(text)}, {"role": "assistant", "content": text[0]}]
            made.append({"messages": said})
        else:
            made.append({"prompt": " ".join(text), "completion": text[0]})
    return made


def test_differences_are_against_the_base(found):
    base, *adapters = found.models
    assert base.differences == {} and base.forgotten is None
    for one in adapters:
        apart = one.differences["loss"]
        assert apart.value == pytest.approx(one.scores["loss"].value - base.scores["loss"].value)
        assert apart.low <= apart.value <= apart.high
        assert one.forgotten.value == pytest.approx(one.forgetting.value - base.forgetting.value)


def test_what_an_adapter_never_touched_was_not_forgotten(lora, rows, tmp_path, t5):
    """A fresh LoRA is the identity: nothing differs, to the last bit."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    from deltatune import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_pretrained(t5)
    get_peft_model(model, LoraConfig(r=2, task_type="SEQ_2_SEQ_LM")).save_pretrained(tmp_path / "fresh")
    found = evaluate_adapters([str(tmp_path / "fresh")], str(rows), forgetting="builtin", answers=False, draws=20)
    fresh = found.models[1]
    assert fresh.differences["loss"].value == fresh.forgotten.value == 0.0
    assert found.inputs == 0


def test_a_table_for_people_and_json_for_programs(run, lora, prefix, rows, tmp_path):
    words = ["eval", lora, prefix, "--data", rows, "--limit", 8, "--draws", 50, "--forgetting", "builtin"]
    shown = run(*words)
    assert shown.code == 0, shown.err
    assert max(map(len, shown.out.splitlines())) <= 80
    assert "against base" in shown.out and "forgetting" in shown.out
    file = tmp_path / "scores.json"
    told = run(*words, "--json", "--output", file, "--no-base")
    assert told.code == 0, told.err
    read = json.loads(told.out)
    assert read == json.loads(file.read_text())
    assert [one["name"] for one in read["models"]] == ["lora", "prefix"]
    assert read["rows"] == 8


def test_classes_are_those_the_adapter_was_trained_with(run, classifier, tmp_path):
    file = tmp_path / "test.csv"
    file.write_text("text,label\nred cat,animal\ngold cat,animal\nblue cat,animal\n")  # one class only
    done = run("eval", classifier, "--data", file, "--json", "--draws", 20)
    assert done.code == 0, done.err
    read = json.loads(done.out)
    answered = run("generate", classifier, "red cat", "gold cat", "blue cat", "--json")
    labels = [json.loads(line)["output"] for line in answered.out.splitlines()]
    right = sum(label == "animal" for label in labels) / 3
    assert read["models"][1]["scores"]["accuracy"]["value"] == pytest.approx(right)
    numbered = tmp_path / "numbered.csv"
    numbered.write_text("text,label\nred cat,0\ngold cat,0\nblue cat,0\n")
    same = json.loads(run("eval", classifier, "--data", numbered, "--json", "--draws", 20).out)
    assert same["models"] == read["models"]
    file.write_text("text,label\nred cat,animal\ngold cat,cloud\n")
    done = run("eval", classifier, "--data", file)
    assert done.code == 3 and "'cloud'" in done.err


def test_a_base_without_adapters_is_scored_too(run, t5, rows):
    done = run("eval", "--model", t5, "--data", rows, "--limit", 4, "--json", "--draws", 20, "--max-new-tokens", 3)
    assert done.code == 0, done.err
    assert [one["name"] for one in json.loads(done.out)["models"]] == ["base"]


def test_what_does_not_belong_together_is_refused(refused, lora, classifier, t5, rows):
    assert "do not belong together: task" in refused(2, "eval", lora, classifier, "--data", rows)
    assert "no data" in refused(3, "eval", lora)
    assert "is a model and no adapter" in refused(2, "eval", t5, "--data", rows)
    assert "no adapter and no model" in refused(2, "eval", "--data", rows)
    assert "expected NAME=NAME_IN_THE_FILE" in refused(2, "eval", lora, "--data", rows, "--column", "x")
    assert "forgetting" in refused(2, "eval", classifier, "--data", rows, "--forgetting", "builtin")


def test_the_harness_is_asked_for_only_where_it_is_installed(refused, lora):
    from importlib.util import find_spec

    if find_spec("lm_eval") is not None:
        pytest.skip("lm-evaluation-harness is installed")
    assert "deltatune[harness]" in refused(4, "eval", lora, "--lm-eval", "hellaswag")


def test_the_harness_sees_each_adapter(lora, t5, rows, tmp_path):
    """On a task of our own, for its tasks are on the hub: as it judges the base, and the base merged with LoRA."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from dataclasses import replace

    from transformers import AutoModelForSeq2SeqLM

    from deltatune import PeftModel
    from deltatune.generate import load_ready
    from deltatune.scoring.harness import run_harness

    read = [json.loads(line) for line in rows.read_text().splitlines()]
    asked = [{"q": row["input"], "a": row["target"], "b": row["input"]} for row in read]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (tmp_path / "ours.yaml").write_text(
        "task: ours\ndataset_path: json\nvalidation_split: validation\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{validation: {tmp_path / 'rows.jsonl'}}}}}\n"
        "doc_to_text: '{{q}}'\ndoc_to_choice: ['{{a}}', '{{b}}']\ndoc_to_target: 0\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    found = evaluate_adapters([str(lora)], lm_eval=["ours"], lm_eval_include=str(tmp_path))
    base = load_ready(str(t5))
    merged = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(t5), lora).merge_and_unload().eval()
    for one, ready in zip(found.models, (base, replace(base, model=merged))):
        assert one.harness == run_harness(ready, ["ours"], 4, include=str(tmp_path))
        assert 0 < one.harness["ours"]["acc"] < 1
