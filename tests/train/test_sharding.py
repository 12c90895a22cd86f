"""`profile: fsdp2`: a base in shards trains what a whole one does, whatever the adapter reads of its weights."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch

from deltatune import PeftModel
from deltatune.errors import ConfigError, MergeError, MismatchError
from deltatune.registry import METHODS as METHOD_TABLE
from deltatune.storage.fingerprint import fingerprint
from deltatune.storage.weights import facts_of
from deltatune.train import train
from deltatune.train.sharding import check_shardable, shard
from tests.train import test_every_method as every
from tests.train import toys
from tests.train.test_every_method import OPTIONS, WITH_TASKS
from tests.train.test_processes import ONE, TWO, check_kill, check_processes, crew, job, same

gloo = pytest.mark.skipif(
    not hasattr(os, "fork") or not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs fork and a torch with gloo",
)
# What reads the weight of the base in its passes (dora), has it read by a fused function (lora), started from it
# (pissa), hands keys to the attention (prefix_tuning), scales (ia3), reads embeddings, trains a module whole.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "r": 4, "target_modules": "all-linear"},
    "dora": {"method": "lora", "r": 4, "use_dora": True},
    "pissa": {"method": "lora", "r": 4, "init_lora_weights": "pissa"},
    "prefix": {"method": "prefix_tuning", "num_virtual_tokens": 3},
    "ia3": {"method": "ia3"},
    "prompt": {"method": "prompt_tuning", "num_virtual_tokens": 3},
    "head": {"method": "lora", "r": 4, "modules_to_save": ["lm_head"]},
}
base, rows, experts = every.base, every.rows, every.experts  # fixtures
ANSWERS = {"num_samples": 2, "num_scored": 4, "eval_before": True}  # a T5 answers from its encoder on


@gloo
@pytest.mark.slow
def test_shards_learn_what_one_process_does_and_go_on_where_the_other_left_off(settings, tmp_path):
    check_processes("fsdp2", settings, tmp_path)


@gloo
@pytest.mark.slow
def test_a_killed_process_ends_those_that_wait_for_its_shards_and_the_run_can_go_on(settings, tmp_path):
    check_kill("fsdp2", settings, tmp_path)


@gloo
@pytest.mark.slow
def test_a_base_is_shared_on_each_machine_or_over_all(settings, tmp_path):
    """Four processes on two machines; a run that went over all goes on with shards that stay on their machine."""
    size = {**ONE, "per_device_train_batch_size": 1, "save_steps": 2, "per_device_eval_batch_size": 2}
    whole, inside, over, moved = (tmp_path / name for name in ("whole", "inside", "over", "moved"))
    train(settings("causal", output_dir=str(whole), **ONE))
    shards = {**size, "profile": "fsdp2", "machines": 2}
    jobs = [
        job(settings, inside, **shards),
        job(settings, over, **shards, shard_across="all"),
        job(settings, moved, **shards, shard_across="all", break_at=3),
        job(settings, moved, **shards, resume_from_checkpoint=True),
    ]
    told = crew(tmp_path, jobs, count=4, limit=500)["told"]
    assert [part["exit"] for part in told[3]] == ["done", "done", "KeyError: 'broken off'", "done"]
    held = [[process[place]["held"] for process in told] for place in (0, 1, 3)]
    assert held == [pytest.approx([share] * 4, abs=0.1) for share in (0.5, 0.25, 0.5)]
    for output in (inside, over, moved):
        same(whole, output)


@gloo
@pytest.mark.slow
@pytest.mark.parametrize("task", ["causal", "seq2seq"])
def test_methods_on_shards_learn_what_they_learn_on_a_whole_base(task, settings, tmp_path):
    folder = toys.llama(tmp_path / "base") if task == "causal" else toys.t5(tmp_path / "base", dropout=0.0)

    def made(name: str, size: dict[str, Any]) -> dict[str, Any]:
        extra = {"gradient_checkpointing": True} if name == "dora" else {}
        asked: dict[str, Any] = {"task": task, "model_name_or_path": str(folder), "max_steps": 3, "save_steps": 0}
        asked["per_device_eval_batch_size"] = 2  # as many answers at a time, whose padding is the same
        return {**size, **METHODS[name], **extra, **ANSWERS, **asked}

    jobs = []
    for name in METHODS:
        train(settings(output_dir=str(tmp_path / name), **made(name, ONE)))
        jobs.append(job(settings, tmp_path / f"{name}-two", **made(name, {**TWO, "profile": "fsdp2"})))
    told = crew(tmp_path, jobs, limit=500)["told"]
    assert [part["exit"] for part in told[0]] == ["done"] * len(METHODS)
    for place, name in enumerate(METHODS):
        one, two = tmp_path / name, tmp_path / f"{name}-two"
        assert told[0][place]["held"] == pytest.approx(0.5, abs=0.1), name
        same(one, two)
        before, after = (json.loads((output / "metrics.json").read_text())["before"] for output in (one, two))
        assert after["eval"] == pytest.approx(before["eval"], rel=1e-5, abs=1e-5), name
        a, b = (facts_of(output / "adapter_model.safetensors") for output in (one, two))
        assert a is not None and b is not None and a["base"] == b["base"], name


@gloo
@pytest.mark.slow
def test_every_method_learns_on_shards_what_it_learns_under_ddp(base, rows, experts, settings, tmp_path):
    """Some draw numbers in every pass, others in each process, so the measure is a whole base in two processes."""
    common = {
        "model_name_or_path": str(base), "train_file": str(rows), "max_steps": 2, "per_device_train_batch_size": 2,
        "logging_steps": 1, "save_steps": 0, "lr_scheduler_type": "constant", "warmup_ratio": 0,
    }  # fmt: skip
    names, jobs = [entry.name for entry in METHOD_TABLE.values()], []
    for method in names:
        options = {**OPTIONS.get(method, {}), **({"adapters": experts} if method == "xlora" else {})}
        tasks = {"task_column": "task"} if method in WITH_TASKS else {}
        asked = {**common, "method": method, "method_options": options, **tasks}
        jobs += [job(settings, tmp_path / f"{method}-{p}", **asked, profile=p) for p in ("ddp", "fsdp2")]
    told = crew(tmp_path, jobs, limit=500)["told"][0]
    wrong = {}
    for place, method in enumerate(names):
        whole, shards = told[2 * place : 2 * place + 2]
        if [whole["exit"], shards["exit"]] != ["done", "done"] or shards["held"] > 0.6:
            wrong[method] = (whole["exit"], shards["exit"], shards["held"])
        elif shards["losses"] != pytest.approx(whole["losses"], abs=1e-5):
            wrong[method] = (whole["losses"], shards["losses"])
    assert wrong == {}


@gloo
def test_what_cannot_be_done_with_shards_is_refused_and_what_follows_is_as_ever(settings, tmp_path):
    """In one process, which torch lets shard as well: the refusals are those of any number."""
    from torch import distributed
    from transformers import AutoModelForCausalLM

    from deltatune import LoraConfig, get_peft_model

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(toys.llama(tmp_path / "base")),
        LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False),
    )
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    made = fingerprint(model.get_base_model())
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        shard(model, torch.device("cpu"), "node", {"input_ids": ids, "labels": ids})
        with torch.no_grad():
            assert model(input_ids=ids).logits.equal(expected)
        with pytest.raises(MergeError, match=r"q_proj.* is in shards.*loaded whole"):
            model.merge_adapter()
        assert fingerprint(model.get_base_model()) == made
        model.save_pretrained(tmp_path / "saved")
    finally:
        distributed.destroy_process_group()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "saved")
    with torch.no_grad():
        assert loaded.eval()(input_ids=ids).logits.equal(expected)


def test_a_base_without_blocks_or_in_few_bits_is_refused_before_it_is_touched(monkeypatch):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from transformers import LlamaConfig, LlamaForCausalLM

    with pytest.raises(ConfigError, match="names none that it has"):
        check_shardable(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    sizes: Any = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    check_shardable(model)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "NoSuchBlock")
    with pytest.raises(ConfigError, match=r"names none that it has \(NoSuchBlock\)"):
        check_shardable(model)
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP")
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(MismatchError, match=r"cannot shard \S+, whose weight is packed \(Torchao\)"):
        check_shardable(model)


def test_other_stages_of_zero_are_refused_with_what_to_use_instead(settings):
    with pytest.raises(ConfigError, match=r"profile='zero2' is not known, expected zero3: of a frozen base"):
        settings("causal", profile="zero2")


def test_training_a_whole_model_in_shards_is_refused_at_once(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match="shards a frozen base, and method: full trains it"):
        train(settings("causal", profile="fsdp2", method="full"))
    assert not (tmp_path / "out").exists()
