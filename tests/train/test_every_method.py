"""All methods train through the same verb: the loss falls, and the adapter that was saved is one that acts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from deltatune import PeftModel
from deltatune.cli.app import app
from deltatune.registry import METHODS
from tests.train import toys

WIDTH, TOKENS = 32, 32
# What a method cannot do without, or whose default does not fit a model of this width.
OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 4, "target_r": 2},
    "adamss": {"r": 8, "num_subspaces": 2},
    "bitfit": {"target_modules": "all-linear"},
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 32},
    "cpt": {"cpt_token_ids": [5, 6, 7, 8], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "fourierft": {"n_frequency": 64},
    "miss": {"r": 8},
    "multitask_prompt_tuning": {"num_tasks": 2, "num_virtual_tokens": 4},
    "oft": {"oft_block_size": 8},
    "poly": {"n_tasks": 2},
    "road": {"group_size": 32},
    "shira": {"r": 4},
    "supertuning": {"sparsity": 0.8},
    "trainable_tokens": {"token_indices": list(range(3, TOKENS))},
    "unilora": {"theta_d_length": 64},
    "vblora": {"vector_length": 16, "num_vectors": 16},
    "waveft": {"n_frequency": 64},
}
WITH_TASKS = {"poly", "multitask_prompt_tuning"}
RATES = {"adaption_prompt": 0.1}  # its gates are closed at first, and open by the rate in each step
STEPS = 10
# Of each way to train one runs in `make test`: layers, a schedule, tasks, attentions, the input, two passes, beside.
ALWAYS = {"lora", "adalora", "poly", "prefix_tuning", "prompt_tuning", "xlora", "shadow", "bottleneck"}
NAMES = [pytest.param(e.name, marks=() if e.name in ALWAYS else pytest.mark.slow) for e in METHODS.values()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder that already answers something, so that little things can change what it answers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, pad_token_id=0, eos_token_id=1, bos_token_id=None, max_position_embeddings=64,
        initializer_range=0.2, attention_bias=True, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    toys.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = [{**row, "task": number % 2} for number, row in enumerate(toys.pairs(8))]
    return toys.write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", found)


@pytest.fixture(scope="module")
def experts(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two LoRA adapters, for methods that combine such."""
    from transformers import AutoModelForCausalLM

    from deltatune import LoraConfig, get_peft_model

    folders = {}
    for name in ("0", "1"):
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base),
            LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"]),
        )
        folders[name] = str(tmp_path_factory.mktemp("expert"))
        model.save_pretrained(folders[name])
    return folders


def logits(model: PeftModel, method: str) -> torch.Tensor:
    ids = torch.arange(3, 19).view(2, 8)
    tasks = {"task_ids": torch.tensor([0, 1])} if method in WITH_TASKS else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **tasks).logits


@pytest.mark.parametrize("method", NAMES)
def test_it_trains_through_the_verb(method, base, rows, experts, tmp_path):
    from transformers import AutoModelForCausalLM

    from deltatune.train.defaults import learning_rate

    options = {**OPTIONS.get(method, {}), **({"adapters": experts} if method == "xlora" else {})}
    rate = RATES.get(method, learning_rate(method, options))
    asked: dict[str, Any] = {
        "model_name_or_path": base, "task": "causal", "method": method, "train_file": rows, "max_steps": STEPS,
        "per_device_train_batch_size": 8, "learning_rate": rate, "lr_scheduler_type": "constant", "warmup_ratio": 0,
        "device": "cpu", "num_threads": 1, "num_samples": 0, "num_scored": 0, "eval_before": "false",
        "logging_steps": 1, "save_steps": 0, "output_dir": tmp_path / "out",
    }  # fmt: skip
    if method in WITH_TASKS:
        asked["task_column"] = "task"
    words = [f"--{name}={value}" for name, value in asked.items()]
    words += [f"--{name}={json.dumps(value)}" for name, value in options.items()]
    done = CliRunner().invoke(app, ["train", *words])
    assert done.exit_code == 0, done.stderr
    history = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == STEPS and min(losses[-3:]) < losses[0], losses

    def loaded() -> PeftModel:
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")

    bare = AutoModelForCausalLM.from_pretrained(base).eval()
    model = loaded()
    with torch.no_grad():
        untouched = bare(input_ids=torch.arange(3, 19).view(2, 8)).logits
    changed = logits(model, method)
    assert changed.shape == untouched.shape and (changed - untouched).abs().max() > 1e-5
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "again")
    assert torch.equal(logits(again, method), changed)
