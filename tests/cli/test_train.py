"""`deltatune train`: settings in, adapter, metrics and report out."""

import json

import pytest
import yaml


def test_help_names_every_verb(run):
    done = run("--help")
    assert done.code == 0
    for verb in ("demo", "train", "generate", "inspect", "trace", "env"):
        assert verb in done.out
    assert max(len(line) for line in done.out.splitlines()) <= 100


def test_print_config_shows_every_setting_with_its_value(run, usual):
    done = run("train", *usual, "--print-config", "lora_rank=4", "--lr=0.01")
    assert done.code == 0
    shown = yaml.safe_load(done.out)
    assert shown["method_options"]["r"] == 4
    assert shown["learning_rate"] == 0.01
    assert shown["max_length"] == 512


def test_print_config_shows_the_task_that_a_run_would_have(run, bert, labelled):
    """A file made of it is a run's: a task that stands there is not looked for again."""
    words = [f"--model={bert}", f"--train_file={labelled}", "--print-config"]
    assert yaml.safe_load(run("train", *words).out)["task"] == "classification"


def test_a_settings_file_gives_way_to_the_command_line(run, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 1\nmax_length: 64\n")
    for words in ([str(file)], ["-c", str(file)], ["--config", str(file)]):
        shown = yaml.safe_load(run("train", *words, "--seed", "2", "--print-config").out)
        assert (shown["seed"], shown["max_length"]) == (2, 64)


def test_dry_run_checks_everything_and_writes_nothing(run, usual, tmp_path):
    done = run("train", *usual, "--dry-run", f"--output_dir={tmp_path / 'out'}", "r=2", "target_modules=q,v")
    assert done.code == 0
    assert "24" not in str(list(tmp_path.iterdir()))
    assert list(tmp_path.iterdir()) == []
    # q and v of 2 encoder self-attentions, 2 decoder self-attentions and 2 cross-attentions, r * (in + out) each
    assert f"{6 * 2 * 2 * (16 + 16):,} of" in done.out
    assert "18 rows" in done.out  # a quarter of 24 is set aside


def test_a_run_leaves_adapter_settings_metrics_samples_and_report(lora):
    names = {path.name for path in lora.iterdir()}
    wanted = {"adapter_config.json", "adapter_model.safetensors", "settings.json", "metrics.json", "history.jsonl"}
    assert wanted | {"samples.json", "report.html", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    history = [json.loads(line) for line in (lora / "history.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]


def test_the_output_fits_80_columns_and_tells_scores_before_and_after(run, usual, tmp_path):
    done = run("train", *usual, f"--output_dir={tmp_path / 'out'}", "method=ia3")
    assert done.code == 0, done.err
    score = next(line.split() for line in done.out.splitlines() if line.startswith("eval loss"))
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert float(score[2]) == pytest.approx(metrics["before"]["eval"]["loss"], rel=1e-3)
    assert float(score[3]) == pytest.approx(metrics["after"]["eval"]["loss"], rel=1e-3)
    paths = str(tmp_path)
    assert all(len(line) <= 80 for line in done.out.splitlines() if paths[:20] not in line)


def test_the_settings_beside_an_adapter_repeat_the_run(run, lora, tmp_path):
    again = tmp_path / "again"
    assert run("train", lora / "settings.json", "--output_dir", again).code == 0
    one, two = (folder / "adapter_model.safetensors" for folder in (lora, again))
    assert one.read_bytes() == two.read_bytes()


def test_a_finished_folder_is_not_overwritten_unasked(refused, usual, lora):
    before = (lora / "adapter_model.safetensors").read_bytes()
    line = refused(2, "train", *usual, f"--output_dir={lora}", "r=4", "--seed=1")
    assert "overwrite_output_dir" in line
    assert (lora / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("method", "name"),
    [("prompt", "PROMPT_TUNING"), ("p-tuning", "P_TUNING"), ("multitask_prompt_tuning", "MULTITASK_PROMPT_TUNING")],
)
def test_prompts_are_trained_by_name(run, usual, tmp_path, method, name):
    done = run("train", *usual, f"--output_dir={tmp_path / 'out'}", f"--method={method}", "num_virtual_tokens=3")
    assert done.code == 0, done.err
    saved = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (saved["peft_type"], saved["num_virtual_tokens"]) == (name, 3)
    again = run("generate", str(tmp_path / "out"), "a b")
    assert again.code == 0, again.err
