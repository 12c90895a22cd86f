"""Adapter folders in the form that PEFT 0.2, 0.3, 0.6, 0.10 and 0.15 wrote: PEFT 0.21.2 and we compute the same."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import deltatune
from deltatune.errors import PeftWarning
from tests.core.tiny import TASKS, batch, logits, tiny
from tests.peer.old import VERSIONS, fields, saved_on_cuda, write_old
from tests.peer.pairs import loaded_by_peft, peft, saved_by_peft, theirs

EXACT = {"rtol": 1e-5, "atol": 1e-5}
CASES = {
    "lora": ("LORA", peft.LoraConfig, {"r": 4, "lora_alpha": 16}, ("gpt2", "llama", "bert", "t5")),
    "lora-embedding": (
        *("LORA", peft.LoraConfig, {"r": 4, "target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["norm"]}),
        ("llama",),
    ),
    "adalora": ("ADALORA", peft.AdaLoraConfig, {"init_r": 4, "target_r": 2, "total_step": 10}, ("llama", "bert")),
    "ia3": ("IA3", peft.IA3Config, {}, ("gpt2", "llama", "bert", "t5")),
    "loha": ("LOHA", peft.LoHaConfig, {"r": 4, "target_modules": ["q_proj", "down_proj"]}, ("llama",)),
    "lokr": ("LOKR", peft.LoKrConfig, {"r": 2, "target_modules": ["q_proj", "down_proj"]}, ("llama",)),
    "prompt": ("PROMPT_TUNING", peft.PromptTuningConfig, {"num_virtual_tokens": 3}, ("gpt2", "bert", "t5")),
    "prefix": ("PREFIX_TUNING", peft.PrefixTuningConfig, {"num_virtual_tokens": 3}, ("gpt2", "bert", "t5")),
    "prefix-mlp": (
        *("PREFIX_TUNING", peft.PrefixTuningConfig, {"num_virtual_tokens": 3, "prefix_projection": True}),
        ("gpt2",),
    ),
    "p-tuning": (
        *("P_TUNING", peft.PromptEncoderConfig, {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
        ("gpt2", "bert"),
    ),
}
FIRST = {"IA3": "0.6", "LOHA": "0.6", "LOKR": "0.6", "ADALORA": "0.3"}
ALL = [
    (name, arch, version, safe)
    for name, (kind, _, _, archs) in CASES.items()
    for arch in archs
    for version in VERSIONS[VERSIONS.index(FIRST.get(kind, "0.2")) :]
    for safe in ((False, True) if version in ("0.6", "0.15") else (version in ("0.10",),))
]


def inputs_of(name, arch):
    """PEFT's AdaLoRA computes no loss for an adapter that is only loaded."""
    inputs = batch(arch)
    return {key: value for key, value in inputs.items() if name != "adalora" or key != "labels"}


def real(found, expected):
    """Both, of the real tokens: PEFT's logits begin with those of virtual ones."""
    length = min(found.shape[1], expected.shape[1])
    return found[:, -length:], expected[:, -length:]


def old_folder(name, arch, version, safe, path):
    """PEFT's adapter, moved off its start, in that form; and the logits it has."""
    kind, config, options, _ = CASES[name]
    model = theirs(arch, config(task_type=TASKS[arch], **options))
    now = saved_by_peft(model, path / "now")
    values = json.loads((now / "adapter_config.json").read_text())
    assert values["peft_type"] == kind
    values["lora_alpha"] = values.get("lora_alpha")
    with torch.no_grad():
        expected = logits(model, inputs_of(name, arch))
    return write_old(path / "old", version, values, load_file(now / "adapter_model.safetensors"), safe), expected


@pytest.mark.parametrize("name,arch,version,safe", ALL)
def test_an_old_folder_computes_what_it_computed(name, arch, version, safe, tmp_path):
    folder, expected = old_folder(name, arch, version, safe, tmp_path)
    inputs = inputs_of(name, arch)
    with torch.no_grad():
        assert_close(logits(loaded_by_peft(tiny(arch), folder), inputs), expected, **EXACT)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*retired option", PeftWarning)
            ours = deltatune.PeftModel.from_pretrained(tiny(arch), folder)
        found = logits(ours, inputs)
    assert_close(*real(found, expected), **EXACT)
    ours.save_pretrained(tmp_path / "again")
    again = deltatune.PeftModel.from_pretrained(tiny(arch), tmp_path / "again")
    with torch.no_grad():
        assert_close(logits(again, inputs), found, rtol=0, atol=0)


def test_the_forms_are_those_of_their_times():
    assert fields("0.2", "LORA") == {
        *("base_model_name_or_path", "bias", "enable_lora", "fan_in_fan_out", "inference_mode", "lora_alpha"),
        *("lora_dropout", "merge_weights", "modules_to_save", "peft_type", "r", "target_modules", "task_type"),
    }
    assert "peft_version" not in {name for version in VERSIONS for name in fields(version, "LORA")}
    assert len(fields("0.15", "LORA")) == 29


def test_tensors_that_were_on_a_gpu_load_without_one(tmp_path):
    folder, expected = old_folder("lora", "llama", "0.3", False, tmp_path)
    saved_on_cuda(folder / "adapter_model.bin")
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(folder / "adapter_model.bin", weights_only=True)
    with torch.no_grad():
        found = logits(deltatune.PeftModel.from_pretrained(tiny("llama"), folder), batch("llama"))
    assert_close(found, expected, **EXACT)


def test_an_adalora_of_old_keeps_the_ranks_that_its_config_names(tmp_path):
    folder, _ = old_folder("adalora", "llama", "0.3", False, tmp_path)
    values = json.loads((folder / "adapter_config.json").read_text())
    tensors = torch.load(folder / "adapter_model.bin", weights_only=True)
    layers = sorted(key.removesuffix(".lora_E") for key in tensors if key.endswith("lora_E"))
    kept = {layer: [True, index % 2 == 0, False, True] for index, layer in enumerate(layers)}
    values["rank_pattern"] = {f"{layer.removeprefix('base_model.model.')}.lora_E": kept[layer] for layer in layers}
    for layer, mask in kept.items():
        index = torch.tensor(mask)
        tensors[f"{layer}.lora_E"], tensors[f"{layer}.lora_A"] = (
            tensors[f"{layer}.lora_E"][index],
            tensors[f"{layer}.lora_A"][index],
        )
        tensors[f"{layer}.lora_B"] = tensors[f"{layer}.lora_B"][:, index]
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(values))
    inputs = inputs_of("adalora", "llama")
    with torch.no_grad():
        expected = logits(loaded_by_peft(tiny("llama"), folder), inputs)
        assert_close(logits(deltatune.PeftModel.from_pretrained(tiny("llama"), folder), inputs), expected, **EXACT)
