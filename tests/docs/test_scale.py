"""What `docs/scale.md` tells people to type can be typed, and its figures follow from its formulas."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from deltatune.cli.launch import Launch

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_its_commands_are_taken_as_they_stand(tmp_path, monkeypatch):
    """Up to the start of processes, which is caught: words, launcher and settings are read by the command itself."""
    from typer.testing import CliRunner

    from deltatune.cli import train as verb
    from deltatune.cli.app import app

    monkeypatch.chdir(tmp_path)
    (settings,) = blocks("yaml")
    Path("run.yaml").write_text(settings)
    started: list[tuple[Launch, list[str]]] = []
    monkeypatch.setattr(verb, "launch", lambda how, words: started.append((how, list(words))) or how.check() or 0)
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) == 2
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "deltatune"
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    (eight, words), (four_machines, _) = started
    assert eight == Launch("torchrun", 8)
    assert four_machines == Launch("torchrun", 8, 4, 0, "10.0.0.1")
    read = verb.settings_of(words[1:], None)
    assert (read.profile, read.shard_across, read.method_options["r"]) == ("fsdp2", "node", 16)
    assert read.model_dump()["max_length"] == yaml.safe_load(settings)["max_length"]


def test_its_figures_are_those_of_the_architecture():
    from transformers import LlamaConfig, LlamaForCausalLM

    from deltatune import LoraConfig, get_peft_model

    shape: dict[str, Any] = {
        "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 1,
        "num_attention_heads": 64, "num_key_value_heads": 8,
    }  # fmt: skip
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**shape))
        block = sum(p.numel() for p in base.model.layers.parameters())
        outside = sum(p.numel() for p in base.parameters()) - block
        lora = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
    trained = 80 * sum(p.numel() for p in lora.parameters() if p.requires_grad)
    total = 80 * block + outside
    for told in (f"{total / 1e9:.2f} G", f"{block / 1e6:.1f} M", f"{outside / 1e6:,.1f} M", f"{trained / 1e6:.1f} M"):
        assert f"| {told} |" in PAGE, told
    rows = {
        "blocks, in shards": 2 * 80 * block / 8,
        "outside, whole": 2 * outside,
        "gathered": 4 * block,
        "adapter": 16 * trained,
        "buckets": 4 * trained,
        "inputs of the blocks": 2 * 80 * 4096 * 8192,
        "one block recomputed": 2 * 4096 * (12 * 8192 + 4 * 28672),
        "logits": 4 * 65 * 128256,
    }
    for name, expected in rows.items():
        (line,) = re.findall(rf"^\| {name}.*\| ([\d.]+) \|$", PAGE, re.MULTILINE)
        assert float(line) == pytest.approx(expected / 1e9, abs=0.051), name
    assert f"**{round(sum(rows.values()) / 1e9 + 1)}**" in PAGE
