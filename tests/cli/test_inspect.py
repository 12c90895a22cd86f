"""`deltatune inspect`: facts from files alone, checked against the tensors."""

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from deltatune.inspect import inspect_adapter, inspect_model


def copy(folder, place):
    return shutil.copytree(folder, place, ignore=shutil.ignore_patterns("checkpoint-*"))


@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_facts_agree_with_the_files(run, request, name, t5):
    folder = request.getfixturevalue(name)
    done = run("inspect", folder, "--json")
    assert done.code == 0, done.out
    found = json.loads(done.out)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert found["method"] == {"lora": "LORA", "prefix": "PREFIX_TUNING"}[name]
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert {t["name"]: tuple(t["shape"]) for t in found["tensors"]} == {k: tuple(t.shape) for k, t in tensors.items()}
    for fact in found["tensors"]:
        assert fact["norm"] == pytest.approx(tensors[fact["name"]].double().norm().item())
    assert found["base"] == str(t5)
    assert found["problems"] == []
    assert sum(group["count"] for group in found["groups"]) == len(tensors)


def test_the_base_is_not_needed(run, lora, tmp_path):
    folder = copy(lora, tmp_path / "moved")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "./gone"}))
    done = run("inspect", folder)
    assert done.code == 0
    assert "gone" in done.out
    assert "no problems found" in done.out


def test_the_run_that_wrote_it_is_told(run, lora, rows):
    found = json.loads(run("inspect", lora, "--json").out)["origin"]
    assert found["command"] == f"deltatune train {lora}/settings.json"
    assert found["data"]["train_file"] == str(rows)
    assert (found["steps"], found["train_rows"]) == (4, 18)
    shown = run("inspect", lora).out
    assert "4 steps on 18 rows" in shown
    assert "eval, after" in shown


def broken(folder, change):
    """Change the tensors of a folder and write them as another tool would."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return inspect_adapter(folder).problems


def test_problems_are_found(lora, tmp_path):
    first = sorted(load_file(lora / "adapter_model.safetensors"))[0]
    nan = broken(copy(lora, tmp_path / "a"), lambda t: t[first].view(-1)[0].fill_(float("nan")))
    assert any(first in line and "not finite" in line for line in nan)
    missing = broken(copy(lora, tmp_path / "b"), lambda t: t.pop(first))
    assert any("lora_A" in line for line in missing)
    surplus = broken(copy(lora, tmp_path / "c"), lambda t: t.update({"base_model.model.x.weight": torch.ones(2)}))
    assert any("base_model.model.x.weight" in line for line in surplus)
    zero = broken(copy(lora, tmp_path / "d"), lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k])
    assert any("never trained" in line for line in zero)


def test_a_prefix_of_the_wrong_shape_is_a_problem_and_exit_code_3(run, prefix, tmp_path):
    folder = copy(prefix, tmp_path / "p")
    found = broken(folder, lambda t: t.update({"prefix_embeddings": torch.ones(2, 7)}))
    assert any("(2, 7)" in line for line in found)
    assert run("inspect", folder).code == 3


def test_changed_values_under_our_header_are_told(lora, tmp_path):
    folder = copy(lora, tmp_path / "x")
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x01
    file.write_bytes(content)
    assert any("digest" in line for line in inspect_adapter(folder).problems)


def test_a_model_folder_shows_layers_targets_and_attentions(run, t5, bert):
    facts = inspect_model(t5)
    linear = {layer.name: layer for layer in facts.layers}
    assert linear["encoder.block.*.layer.*.SelfAttention.q"].count == 2
    assert linear["decoder.block.*.layer.*.DenseReluDense.wi"].shape == (32, 16)
    assert facts.defaults["LORA"] == ["q", "v"]
    assert sorted(site.kind for site in facts.sites) == ["cross"] * 2 + ["encoder"] * 2 + ["self"] * 2
    done = run("inspect", bert)
    assert done.code == 0
    assert "query" in done.out


def test_a_model_folder_shows_which_attentions_a_prefix_reaches(run, t5, tmp_path):
    assert re.search(r"attentions: 6, of which a prefix reaches 6", run("inspect", t5).out)
    settings = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 32}
    config = transformers.LEDConfig(
        **settings, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, attention_window=8,
        architectures=["LEDForConditionalGeneration"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    transformers.LEDForConditionalGeneration(config).save_pretrained(tmp_path)
    facts = inspect_model(tmp_path)
    assert [(site.kind, site.shape, site.way) for site in facts.sites] == [
        ("self", [2, 8, 2, 8], "own code"),
        ("cross", [2, 8, 2, 8], "own code"),
    ]
    assert [(each.class_name, each.kind) for each in facts.unreached] == [("LEDEncoderSelfAttention", "encoder")]
    shown = run("inspect", tmp_path).out
    assert "attentions: 3, of which a prefix reaches 2" in shown
    assert "out of reach: 1 LEDEncoderSelfAttention at led.encoder.layers.*.self_attn" in shown
