"""Bad input gets one line that names the thing, an exit code, and no traceback."""

import json
import shutil

import pytest

from deltatune.cli.failures import CODES, explain
from deltatune.errors import PeftError


def test_unknown_setting_is_answered_with_the_nearest(refused, usual):
    assert "'learning_rate'" in refused(2, "train", *usual, "--learning_rat=1e-4")
    assert "num_virtual_tokens" in refused(2, "train", *usual, "method=prefix", "--virtual_tokens=5")


def test_wrong_type_and_value_out_of_range_name_the_setting(refused, usual):
    assert "max_length" in refused(2, "train", *usual, "--max_length=long")
    assert "warmup_ratio" in refused(2, "train", *usual, "warmup_ratio=1.5")
    line = refused(2, "train", *usual, "r=0")
    assert "r=0" in line


def test_target_that_matches_nothing_lists_real_layers(refused, usual, tmp_path):
    line = refused(2, "train", *usual, "target_modules=qq,vv", f"output_dir={tmp_path / 'o'}")
    assert "SelfAttention" in line
    assert "qq" in line


def test_no_settings_and_unknown_verbs_and_options(refused):
    assert "--help" in refused(2, "train")
    assert "train" in refused(2, "trian")
    assert "--fast" in refused(2, "env", "--fast")
    assert "'adapter'" in refused(2, "generate").lower()


def test_settings_file_that_is_missing_or_malformed(refused, tmp_path):
    assert "nowhere.yaml" in refused(2, "train", tmp_path / "nowhere.yaml")
    file = tmp_path / "bad.yaml"
    file.write_text("a: [1, 2\n")
    assert "bad.yaml" in refused(2, "train", file)
    file.write_text("- 1\n- 2\n")
    assert "list" in refused(2, "train", file)


def test_prefix_on_a_model_without_attention(refused, tmp_path, rows):
    from transformers import MambaConfig, MambaForCausalLM

    from tests.cli.conftest import tokenizer

    config = MambaConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, state_size=4, expand=2, time_step_rank=2)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tokenizer().save_pretrained(tmp_path / "mamba")
    words = [f"model={tmp_path / 'mamba'}", f"train_file={rows}", "task=causal", "method=prefix", "max_steps=1"]
    line = refused(2, "train", *words, f"output_dir={tmp_path / 'out'}")
    assert "no attention" in line
    assert "LoRA" in line


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "data.jsonl"),
        ('{"input": "red", "target": "red"}\n{"input": "red", \n', "line 2"),
        ('{"input": "red", "target": "red"}\n{"input": "red"}\n', "'target'"),
        ('{"input": "red", "target": "red"}\n{"input": 3, "target": "red"}\n', "'input'"),
        ('{"foo": "red", "bar": "red"}\n', "columns"),
    ],
)
def test_bad_data_file_is_told_by_file_line_and_field(refused, t5, tmp_path, content, told):
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    line = refused(3, "train", f"model={t5}", f"train_file={file}", f"output_dir={tmp_path / 'out'}")
    assert told in line
    assert "data.jsonl" in line


def test_unlabelled_row_of_a_classifier(refused, bert, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text,label\nred cat,animal\nred sun,\n")
    words = ["task=classification", f"model={bert}", f"train_file={file}", f"output_dir={tmp_path / 'out'}"]
    line = refused(3, "train", *words)
    assert "line 3" in line
    assert "label" in line


def test_missing_data_file_and_missing_model(refused, t5, rows, tmp_path):
    assert "nothing.jsonl" in refused(
        3, "train", f"model={t5}", f"train_file={tmp_path / 'nothing.jsonl'}", f"output_dir={tmp_path / 'o'}"
    )
    line = refused(3, "train", "model=./no/such/model", f"train_file={rows}", f"output_dir={tmp_path / 'o'}")
    assert "no/such/model" in line


@pytest.mark.parametrize("verb", ["generate", "inspect", "trace"])
def test_adapter_folder_that_is_missing_or_empty(refused, verb, tmp_path):
    words = ["red"] if verb == "generate" else []
    assert "nowhere" in refused(3, verb, tmp_path / "nowhere", *words)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "adapter_config.json" in refused(3, verb, empty, *words)


@pytest.mark.parametrize("verb", ["generate", "inspect", "trace"])
def test_truncated_adapter_file(refused, lora, verb, tmp_path):
    folder = shutil.copytree(lora, tmp_path / "cut", ignore=shutil.ignore_patterns("checkpoint-*"))
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    words = ["red"] if verb == "generate" else []
    assert "adapter_model.safetensors" in refused(3, verb, folder, *words)


def test_adapter_for_another_base(refused, lora, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    from tests.cli.conftest import tokenizer

    config = T5Config(vocab_size=16, d_model=24, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")
    before = (lora / "adapter_model.safetensors").read_bytes()
    line = refused(3, "generate", lora, "red", "--model", tmp_path / "other")
    assert "another base" in line
    assert (lora / "adapter_model.safetensors").read_bytes() == before


def test_adapter_config_that_is_no_json_or_names_no_method(refused, lora, tmp_path):
    folder = shutil.copytree(lora, tmp_path / "bad", ignore=shutil.ignore_patterns("checkpoint-*"))
    file = folder / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text("{" + file.read_text())
    assert "adapter_config.json" in refused(3, "inspect", folder)
    file.write_text(json.dumps({**values, "peft_type": "LORRA"}))
    assert "LORA" in refused(2, "inspect", folder)


def test_a_fault_of_ours_is_one_line_unless_debug_is_asked_for(run, monkeypatch):
    def broken(as_json):
        raise RuntimeError("the wheel came off\nsecond line")

    monkeypatch.setattr("deltatune.cli.env.env", broken)
    done = run("env")
    assert done.code == 1
    assert done.lines == [
        "deltatune: internal error: RuntimeError: the wheel came off; run again with --debug for the traceback"
    ]
    done = run("env", "--debug")
    assert done.code == 1
    assert "Traceback" in done.err


def test_every_deliberate_error_has_a_code():
    def below(kind):
        return {kind}.union(*(below(sub) for sub in kind.__subclasses__()))

    for kind in below(PeftError) - {PeftError}:
        code, text = explain(kind("told"))
        assert text == "told"
        assert code in (2, 3, 4, 5)
        assert any(issubclass(kind, known) for known in CODES)


def test_signals_have_the_codes_of_the_shell():
    import signal

    from deltatune.train import TrainingInterrupted

    assert explain(TrainingInterrupted(signal.SIGINT, 5, None))[0] == 130
    assert explain(TrainingInterrupted(signal.SIGTERM, 5, None))[0] == 143


def test_full_disk_and_memory_are_resources():
    import torch

    assert explain(OSError(28, "No space left on device", "out/file"))[0] == 4
    assert explain(MemoryError())[0] == 4
    assert explain(torch.OutOfMemoryError("CUDA out of memory"))[0] == 4
    assert explain(KeyboardInterrupt())[0] == 130
