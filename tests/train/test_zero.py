"""`profile: zero3`: DeepSpeed shares the base out, and all else is as in one process."""

from __future__ import annotations

import importlib.util
import types
from typing import Any

import pytest
import torch

from deltatune.errors import ConfigError, MergeError, StateError
from deltatune.train import train
from deltatune.train.zero import config_for, partition
from tests.train import toys
from tests.train.test_processes import ONE, TWO, check_kill, check_processes, crew, job, same
from tests.train.test_sharding import ANSWERS, METHODS, gloo

deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed (pip install 'deltatune[deepspeed]')"
)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    # DeepSpeed's own call of what torch will rename
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:`torch.distributed.all_gather_into_tensor`")


@gloo
@deepspeed
@pytest.mark.slow
def test_partitions_learn_what_one_process_does_and_go_on_where_the_other_left_off(settings, tmp_path, on_cpu):
    check_processes("zero3", settings, tmp_path)


@gloo
@deepspeed
@pytest.mark.slow
def test_a_killed_process_ends_those_that_wait_for_its_partitions(settings, tmp_path, on_cpu):
    check_kill("zero3", settings, tmp_path)


@gloo
@deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("task", ["causal", "seq2seq"])
def test_methods_on_partitions_learn_what_they_learn_on_a_whole_base(task, settings, tmp_path, on_cpu):
    folder = toys.llama(tmp_path / "base") if task == "causal" else toys.t5(tmp_path / "base", dropout=0.0)

    def made(name: str, size: dict[str, Any]) -> dict[str, Any]:
        extra = {"gradient_checkpointing": True} if name == "dora" else {}
        asked: dict[str, Any] = {"task": task, "model_name_or_path": str(folder), "max_steps": 3, "save_steps": 0}
        asked["per_device_eval_batch_size"] = 2
        return {**size, **METHODS[name], **extra, **ANSWERS, **asked}

    jobs = []
    for name in METHODS:
        train(settings(output_dir=str(tmp_path / name), **made(name, ONE)))
        offload = "cpu" if name == "lora" else "none"
        size = {**TWO, "profile": "zero3", "zero3_offload": offload}
        jobs.append(job(settings, tmp_path / f"{name}-two", **made(name, size)))
    told = crew(tmp_path, jobs, limit=500)["told"]
    assert [part["exit"] for part in told[0]] == ["done"] * len(METHODS)
    for place, name in enumerate(METHODS):
        assert told[0][place]["held"] == pytest.approx(0.5, abs=0.1), name
        same(tmp_path / name, tmp_path / f"{name}-two")


def stand_in(calls: list[Any]) -> Any:
    """What is used of DeepSpeed, in one process: parameters are put away, and gathered when they are asked for."""

    def put_away(parameter: Any, number: int) -> None:
        parameter.ds_id, parameter.ds_numel = number, parameter.numel()
        parameter.ds_active_sub_modules, kept = set(), parameter.data
        parameter.data = torch.empty(0)
        parameter.back = lambda: setattr(parameter, "data", kept)
        parameter.all_gather = lambda parameters: [part.back() for part in parameters]
        parameter.partition = lambda: None

    def init(module: torch.nn.Module, data_parallel_group: Any, config_dict_or_path: dict[str, Any]) -> None:
        calls.append(("Init", config_dict_or_path))
        for number, parameter in enumerate(module.parameters()):
            put_away(parameter, number)

    def initialize(model: torch.nn.Module, config: dict[str, Any], dist_init_required: bool) -> None:
        calls.append(("initialize", config))
        assert all(not parameter.numel() for parameter in model.parameters())
        for module in model.modules():  # its hooks
            for parameter in module.parameters(recurse=False):
                module.register_forward_pre_hook(lambda *given, parameter=parameter: parameter.back())

    leaf = types.SimpleNamespace(set_z3_leaf_module=lambda module, flag: calls.append(type(module).__name__))
    return types.SimpleNamespace(utils=leaf, zero=types.SimpleNamespace(Init=init), initialize=initialize)


@gloo
def test_what_deepspeed_is_asked_for_and_what_it_may_never_release(tmp_path):
    from torch import distributed
    from transformers import AutoModelForCausalLM

    from deltatune import LoraConfig, get_peft_model
    from deltatune.train.sharding import sharded

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(toys.llama(tmp_path / "base")),
        LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False),
    )
    ids, counted = torch.arange(3, 19).view(2, 8), model.get_nb_trainable_parameters()
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    calls: list[Any] = []
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        partition(model, torch.device("cpu"), "node", "cpu", {"input_ids": ids, "labels": ids}, stand_in(calls))
    finally:
        distributed.destroy_process_group()
    config = config_for("cpu")
    assert calls == ["LlamaDecoderLayer"] * 2 + [("Init", config), ("initialize", config)]
    assert config["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert "offload_param" not in config_for("none")["zero_optimization"]
    assert sharded(model)
    with torch.no_grad():
        assert model(input_ids=ids).logits.equal(expected)
    assert model.get_nb_trainable_parameters() == counted
    for name, parameter in model.named_parameters():
        stays = parameter.requires_grad or ".layers." not in name
        assert bool(getattr(parameter, "ds_persist", False)) == stays, name
        assert bool(parameter.ds_active_sub_modules) == stays, name  # type: ignore[attr-defined]
        if stays:
            with pytest.raises(StateError, match="was about to partition a parameter"):
                parameter.partition()  # type: ignore[attr-defined]
    with pytest.raises(MergeError, match="is in shards"):
        model.merge_adapter()


def test_without_deepspeed_a_run_that_asks_for_it_says_what_to_install(settings, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "deepspeed" else find(name))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(
        ConfigError, match=r"needs DeepSpeed, which is not installed: pip install 'deltatune\[deepspeed\]'"
    ):
        train(settings("causal", profile="zero3"))
    with pytest.raises(ConfigError, match=r"profile='zero3' shards a frozen base, and method: full trains it"):
        train(settings("causal", profile="zero3", method="full"))
    assert not (tmp_path / "out").exists()
