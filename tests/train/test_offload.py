"""A base of which accelerate keeps a part on disk or in host memory: adapters are what they are on a whole one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deltatune import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from deltatune.errors import ConfigError, MergeError
from deltatune.kernels import low_rank
from deltatune.train import train
from tests.train import toys
from tests.train.test_processes import losses

MAP = {
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.norm": "disk", "lm_head": "disk",
}  # fmt: skip
TEXT: dict[str, Any] = {"task_type": "CAUSAL_LM"}
# by the layer's own pass, by the norm of W + B A, from singular vectors of W, by W scaled, in attention
CONFIGS = {
    "lora": lambda: LoraConfig(**TEXT, target_modules="all-linear", init_lora_weights=False),
    "dora": lambda: LoraConfig(**TEXT, use_dora=True, init_lora_weights=False),
    "pissa": lambda: LoraConfig(**TEXT, init_lora_weights="pissa"),
    "ia3": lambda: IA3Config(**TEXT, init_ia3_weights=False),
    "prefix": lambda: PrefixTuningConfig(**TEXT, num_virtual_tokens=3),
}
IDS = torch.arange(3, 19).view(2, 8)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.llama(tmp_path_factory.mktemp("llama"))


def loaded(llama: Path, folder: Path | None = None) -> Any:
    from transformers import AutoModelForCausalLM

    spread = {} if folder is None else {"device_map": MAP, "offload_folder": str(folder)}
    return AutoModelForCausalLM.from_pretrained(llama, **spread)


def adapted(base: Any, name: str) -> PeftModel:
    config = CONFIGS[name]()
    torch.manual_seed(0)
    return get_peft_model(base, config).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_gradients_and_files_are_those_on_a_whole_base(name, llama, tmp_path):
    whole, spread = adapted(loaded(llama), name), adapted(loaded(llama, tmp_path), name)
    trained = {key: parameter for key, parameter in spread.named_parameters() if parameter.requires_grad}
    assert {parameter.device.type for parameter in trained.values()} == {"cpu"}
    expected, found = (model(input_ids=IDS, labels=IDS).loss for model in (whole, spread))
    torch.testing.assert_close(found, expected)
    expected.backward()
    found.backward()
    for key, parameter in whole.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(trained[key].grad, parameter.grad, rtol=1e-5, atol=1e-6, msg=key)
    # and back to disk: what was brought for the pass is not kept
    base: Any = spread.get_base_model()
    assert base.model.layers[1].mlp.up_proj.weight.is_meta
    spread.save_pretrained(tmp_path / "saved")
    for base in (loaded(llama), loaded(llama, tmp_path)):
        again = PeftModel.from_pretrained(base, tmp_path / "saved").eval()
        torch.testing.assert_close(again(input_ids=IDS, labels=IDS).loss, expected)


def test_the_fused_function_leaves_layers_with_hooks_to_their_hooks(llama, tmp_path, monkeypatch):
    """Both layers are on the CPU in passes; only one of them has its weight there in between."""
    used = []
    plain = low_rank.low_rank_linear
    monkeypatch.setattr(low_rank, "low_rank_linear", lambda x, W, *rest: used.append(W.is_meta) or plain(x, W, *rest))
    adapted(loaded(llama), "lora")(input_ids=IDS)
    assert used and not any(used)
    used.clear()
    model = adapted(loaded(llama, tmp_path), "lora")
    model(input_ids=IDS)
    assert not used, "accelerate hooks every layer of a model that it spreads"


def test_merging_into_weights_that_are_brought_anew_is_refused(llama, tmp_path):
    model = adapted(loaded(llama, tmp_path), "lora")
    before = model(input_ids=IDS).logits
    with pytest.raises(MergeError, match=r"layers\.1\.\S+: .*from where it would come back unmerged"):
        model.merge_adapter()
    assert model(input_ids=IDS).logits.equal(before)


def test_training_with_a_part_of_the_base_on_disk_learns_the_same_and_goes_on(llama, settings, tmp_path):
    common = {"model_name_or_path": str(llama), "max_steps": 4, "save_steps": 2, "logging_steps": 1}
    spread = {**common, "device_map": MAP, "offload_folder": str(tmp_path / "offloaded")}
    whole, mine = tmp_path / "whole", tmp_path / "mine"
    train(settings("causal", output_dir=str(whole), **common))
    train(settings("causal", output_dir=str(mine), **spread))
    assert losses(mine) == pytest.approx(losses(whole), abs=1e-5)
    a, b = (load_file(output / "adapter_model.safetensors") for output in (whole, mine))
    assert all(torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-5) for key in a)
    start = str(mine / "checkpoint-2")
    again = settings("causal", output_dir=str(mine), resume_from_checkpoint=start, **spread)
    assert train(again).resumed_from == mine / "checkpoint-2"
    c = load_file(mine / "adapter_model.safetensors")
    assert all(b[key].equal(c[key]) for key in b)


@pytest.mark.parametrize(("processes", "method"), [("2", "lora"), ("1", "full")])
def test_a_spread_base_for_several_processes_or_to_be_trained_is_refused(processes, method, settings, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(ConfigError, match="expected an adapter and one process"):
        train(settings("causal", device_map="auto", method=method))


def test_a_map_is_read_from_the_command_line():
    from deltatune.cli.train import settings_of

    words = ["--train_file=rows.jsonl", "--device_map", json.dumps({"model": "cpu", "lm_head": "disk"})]
    assert settings_of(words, None).device_map == {"model": "cpu", "lm_head": "disk"}
