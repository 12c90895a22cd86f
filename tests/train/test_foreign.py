"""Settings files of other programs, as their users have them."""

from __future__ import annotations

import pytest

from deltatune.errors import ConfigError
from deltatune.recipes import settings_schema
from deltatune.train.detect import detected
from deltatune.train.settings import load_settings
from tests.train import toys

# as https://github.com/hiyouga/LLaMA-Factory has its examples
FACTORY = """
model_name_or_path: base
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: all
dataset: rows.jsonl
template: plain
cutoff_len: 256
max_samples: 100
preprocessing_num_workers: 4
dataloader_num_workers: 4
overwrite_cache: true
output_dir: out
plot_loss: true
per_device_train_batch_size: 1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
"""
# as https://github.com/axolotl-ai-cloud/axolotl has its
AXOLOTL = """
base_model: base
datasets:
  - path: rows.jsonl
    type: alpaca
val_set_size: 0.05
adapter: lora
sequence_len: 256
lora_r: 4
lora_target_linear: true
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_torch
bf16: auto
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')

    def write(text: str, **changes):
        (tmp_path / "run.yaml").write_text(text)
        return load_settings(tmp_path / "run.yaml", changes)

    return write


def test_a_file_of_llama_factory_is_read(file):
    made = file(FACTORY)
    assert made.method_options == {"r": 4, "target_modules": "all-linear", "lora_alpha": 8}
    assert (made.train_file, made.dataset, made.max_train_samples) == ("rows.jsonl", None, 100)
    assert (made.max_length, made.eval_split, made.dtype, made.chat_template) == (256, 0.1, "bfloat16", "plain")


def test_pairs_are_turns_where_a_template_is_named(file, tmp_path):
    toys.llama(tmp_path / "base")
    toys.write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "red", "input": "", "output": "cat"}])
    assert detected(file(FACTORY)).task == "chat"
    assert detected(file(AXOLOTL)).task == "causal"


def test_a_file_of_axolotl_is_read(file):
    made = file(AXOLOTL)
    assert (made.train_file, made.optimizer, made.dtype) == (["rows.jsonl"], "adamw", "auto")
    assert (made.eval_split, made.per_device_train_batch_size, made.num_train_epochs) == (0.05, 2, 1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("stage: dpo", "stage='dpo' is not done, expected sft"),
        ("trust_remote_code: true", "trust_remote_code=True is not done, expected False: code that comes with a model"),
        ("do_train: false", "do_train=False is not done"),
        ("datasets: [{path: a.jsonl, type: alpaca, split: train}]", "says more than a path"),
        ("datasets: [{path: a.jsonl, type: {field_input: q}}]", "says more than a path"),
        ("optim: lion_8bit", "optimizer='lion_8bit' is not allowed"),
    ],
)
def test_what_is_asked_for_and_not_done_is_refused(file, text, told):
    with pytest.raises(ConfigError, match=told.replace("(", "\\(")):
        file(text)


def test_a_dataset_that_is_no_file_stays_one_of_the_hub(file):
    assert file("dataset: squad").dataset == "squad"


def test_all_settings_that_do_not_exist_are_told_at_once(file):
    with pytest.raises(ConfigError) as caught:
        file("learning_rat: 1\nwandb_projekt: x\nseed: 1")
    assert "'learning_rat'; did you mean 'learning_rate'?" in str(caught.value) and "'wandb_projekt'" in str(
        caught.value
    )
    assert caught.value.found == ["learning_rat", "wandb_projekt"]


@pytest.mark.parametrize("text", [FACTORY, AXOLOTL])
def test_an_editor_takes_such_files(text):
    import yaml

    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    jsonschema.validate(yaml.safe_load(text), settings_schema())
