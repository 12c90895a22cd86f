"""The demo run: what it shows, what it draws, and that a saved prefix is itself again."""

import io
import json

import pytest
from rich.console import Console

from deltatune.demo import grammar, show
from deltatune.demo.contest import answers
from deltatune.demo.contestants import CONTESTANTS, FULL_RUN, settings_of
from deltatune.demo.run import main, reloaded_answers, run_demo
from deltatune.demo.score import score
from deltatune.errors import ConfigError

ROWS = grammar.rows("test", 12)


def outcome(key, title, bleu, history):
    scores = {"bleu": bleu, "swapped_bleu": bleu / 2, "names": 0.5, "exact": 0.1}
    numbers = {
        "trainable": 91_234 if history else 0,
        "parameters": 5_000_000,
        "bytes": 365_000,
        "seconds": 61.0,
        "steps": 400,
    }
    outputs = [f"{key} says {row.target}" for row in ROWS]
    return {"key": key, "title": title, "dev_loss": 1.25, "peak_memory": 7e8, "history": history, "scores": scores,
            "outputs": outputs, **numbers}  # fmt: skip


HISTORY = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 1.25}]
OUTCOMES = [outcome("base", "untouched base", 3.0, []), outcome("prefix", "prefix tuning", 80.0, HISTORY)]


def test_true_entries_score_full_marks_and_swapped_ones_far_less():
    found = score([row.target for row in ROWS], ROWS)
    assert found.bleu == pytest.approx(100) and found.names == 1 and found.exact == 1
    assert found.swapped_bleu < 60


def test_fluent_text_that_ignores_the_record_gains_nothing_over_swapped_references():
    found = score([ROWS[0].target] * len(ROWS), ROWS)
    assert found.names < 0.2
    assert found.bleu - found.swapped_bleu < 20


def test_the_table_has_a_row_for_every_contestant():
    out = Console(file=io.StringIO(), width=80)
    out.print(show.table(OUTCOMES))
    text = out.file.getvalue()
    assert "untouched base" in text and "prefix tuning" in text
    assert "1.8 %" in text and "400" in text and "80.0" in text and "365 KB" in text and "61 s" in text


def test_samples_show_record_entry_and_every_output():
    out = Console(file=io.StringIO(), width=120)
    show.samples(out, OUTCOMES, ROWS, 1)
    text = out.file.getvalue()
    assert ROWS[0].input in text and "prefix says" in text and "base says" in text


def test_the_picture_is_a_png_with_something_on_it(tmp_path):
    from PIL import Image

    from deltatune.demo.picture import draw

    image = Image.open(draw(OUTCOMES, tmp_path / "curves.png")).convert("RGB")
    assert image.width > 800 and len(image.getcolors(maxcolors=1_000_000) or []) > 50


def test_settings_of_every_contestant_are_valid_ones(tmp_path):
    from deltatune.train import TrainSettings

    trained = [TrainSettings(**settings_of(one, FULL_RUN, tmp_path)) for one in CONTESTANTS if one.settings]
    assert [settings.method for settings in trained] == ["prefix_tuning", "lora", "full"]
    assert len({settings.per_device_train_batch_size for settings in trained}) == 1
    assert trained[0].max_steps == FULL_RUN.steps > trained[1].max_steps == trained[2].max_steps


@pytest.mark.parametrize("words", [["--fast"], ["--output"], ["here"]])
def test_unknown_words_are_refused(words):
    with pytest.raises(ConfigError, match="expected --quick or --output FOLDER"):
        main(words)


def test_a_prefix_answers_in_a_new_process_as_it_did_here(tmp_path):
    import torch

    from deltatune import PrefixTuningConfig, get_peft_model
    from deltatune.demo.base import load_base

    torch.manual_seed(0)
    base, tokenizer = load_base()
    inputs = [row.input for row in ROWS[:2]]
    untouched = answers(base, tokenizer, inputs)
    model = get_peft_model(base, PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, sites="all")).eval()
    model.save_pretrained(str(tmp_path))
    made = answers(model, tokenizer, inputs)
    assert made != untouched
    assert reloaded_answers(tmp_path, inputs, Console(file=io.StringIO())) == made


@pytest.mark.slow
def test_a_quick_run_leaves_all_its_files(tmp_path):
    out = Console(file=io.StringIO(), width=100)
    result = run_demo(tmp_path, quick=True, console=out)
    assert result.reloaded_equal
    assert [one["key"] for one in result.outcomes] == ["base", "prefix", "lora", "full"]
    assert (tmp_path / "prefix" / "adapter_model.safetensors").is_file() and result.picture.is_file()
    facts = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert facts["outcomes"][3]["trainable"] == facts["outcomes"][3]["parameters"]
    assert "in a new process, gives the same answers" in " ".join(out.file.getvalue().split())
