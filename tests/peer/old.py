"""Folders as earlier releases of PEFT wrote them: which file, which fields of the config, which values.

The tensors have had the same names all along. Sources: PEFT's public history (`save_pretrained` and the config classes
at the releases), adapters of those times in public repositories.
"""

from __future__ import annotations

import json
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VERSIONS = ("0.2", "0.3", "0.6", "0.10", "0.15")
_ROOT = ("base_model_name_or_path", "inference_mode", "peft_type", "task_type")
_TARGETS = ("modules_to_save", "target_modules")
_LAYERS = ("layers_pattern", "layers_to_transform")
_ENCODER = ("encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type")
_SINCE: dict[str, dict[str, tuple[str, ...]]] = {
    "common": {"0.2": _ROOT, "0.6": ("auto_mapping", "revision")},
    "LORA": {
        "0.2": ("bias", "enable_lora", "fan_in_fan_out", "lora_alpha", "lora_dropout", "merge_weights", "r", *_TARGETS),
        "0.3": ("init_lora_weights",),
        "0.6": ("alpha_pattern", "rank_pattern", *_LAYERS),
        "0.10": ("layer_replication", "loftq_config", "megatron_config", "megatron_core", "use_dora", "use_rslora"),
        "0.15": ("corda_config", "eva_config", "exclude_modules", "lora_bias", "trainable_token_indices"),
    },
    "IA3": {
        "0.6": ("fan_in_fan_out", "feedforward_modules", "init_ia3_weights", *_TARGETS),
        "0.15": ("exclude_modules",),
    },
    "PROMPT": {"0.2": ("num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens")},
    "PROMPT_TUNING": {
        "0.2": ("prompt_tuning_init", "prompt_tuning_init_text", "token_dim", "tokenizer_name_or_path"),
        "0.10": ("tokenizer_kwargs",),
    },
    "PREFIX_TUNING": {"0.2": ("encoder_hidden_size", "prefix_projection", "token_dim")},
    "P_TUNING": {"0.2": (*_ENCODER, "token_dim")},
    "LOHA": {
        "0.6": (
            *("alpha", "alpha_pattern", "init_weights", "module_dropout", "r", "rank_dropout", "rank_pattern"),
            *("use_effective_conv2d", *_LAYERS, *_TARGETS),
        ),
        "0.15": ("exclude_modules",),
    },
}
_SINCE["LOKR"] = {
    "0.6": (*_SINCE["LOHA"]["0.6"], "decompose_both", "decompose_factor"),
    "0.15": ("exclude_modules", "rank_dropout_scale"),
}
_ADALORA = ("beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step")
_SINCE["ADALORA"] = {**_SINCE["LORA"], "0.3": ("init_lora_weights", *_ADALORA, "rank_pattern")}
# What fields held that PEFT has dropped, or that today's default is not what they held.
_HELD: dict[str, Any] = {"enable_lora": None, "merge_weights": False, "auto_mapping": None, "revision": None}


def fields(version: str, peft_type: str) -> set[str]:
    """The keys of `adapter_config.json` that a release wrote."""
    groups = ["common", peft_type] + (["PROMPT"] if "TUNING" in peft_type else [])
    until = VERSIONS[: VERSIONS.index(version) + 1]
    found = {name for group in groups for since in until for name in _SINCE[group].get(since, ())}
    return found - ({"enable_lora", "merge_weights"} if version != "0.2" else set())  # gone with 0.3


def write_old(folder: Path, version: str, config: dict[str, Any], tensors: dict[str, Tensor], safe: bool) -> Path:
    """A folder with the content of today's, as that release wrote it; `safe`: as safetensors, an option since 0.4."""
    values = {**_HELD, **config, "inference_mode": True}
    wanted = fields(version, values["peft_type"])
    assert wanted <= values.keys(), sorted(wanted - values.keys())
    folder.mkdir()
    held = {key: values[key] for key in sorted(wanted)}
    (folder / "adapter_config.json").write_text(json.dumps(held, indent=2, sort_keys=True))
    if safe:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(tensors, folder / "adapter_model.bin")
    return folder


def saved_on_cuda(file: Path) -> None:
    """Say in a file of torch.save that its tensors were on the first GPU, as those of trained adapters say."""
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    old, new = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
    assert old in entries[name]
    entries[name] = entries[name].replace(old, new)
    assert any(argument == "cuda:0" for _, argument, _ in pickletools.genops(entries[name]))
    with zipfile.ZipFile(file, "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
