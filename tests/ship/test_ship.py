"""Merging, converting and exporting with proof: for every method that a weight can hold, and with planted faults."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import deltatune as d
from deltatune.cli.app import app
from deltatune.demo.base import load_base
from deltatune.errors import ConversionError, MergeError, SaveError
from deltatune.registry import METHODS
from deltatune.ship import convert as converting
from deltatune.ship import convert_adapter, export_adapter, merge_to_folder
from deltatune.ship import merge as merging
from deltatune.ship.export import ExportError
from deltatune.ship.proof import ProofError
from deltatune.ship.targets import gguf as gguf_target
from deltatune.ship.targets import servers
from deltatune.ship.targets.llama_layout import turned

SHARED = Path(os.environ.get("DELTATUNE_SHARED", Path(__file__).parents[3] / "shared"))
LLAMA = SHARED / "data" / "weights" / "stories260K"  # a real Llama with grouped heads
TEXTS = ["Once upon a time", "The dog"]
# Options that a method needs beside layers; everything else has its defaults.
NEEDED = {
    "lora": {"r": 4}, "adalora": {"total_step": 10, "init_r": 4, "target_r": 2},
    "vblora": {"vector_length": 4, "num_vectors": 16},
    "shira": {"r": 2}, "oft": {"oft_block_size": 4, "r": 0}, "boft": {"boft_block_size": 4}, "c3a": {"block_size": 4},
    "fourierft": {"n_frequency": 20}, "waveft": {"n_frequency": 20}, "unilora": {"theta_d_length": 64},
    "adamss": {"r": 8, "num_subspaces": 2}, "diff_pruning": {"prune_step": 8},
    "trainable_tokens": {"token_indices": [3, 4], "target_modules": None},
}  # fmt: skip
MERGEABLE = sorted(
    method.name
    for method in METHODS.values()
    if method.adapter is not None
    and method.adapter.mergeable is True
    and {"linear"} <= method.adapter.base_kinds
    and isinstance(method.peft_type, d.PeftType)
    and method.name not in ("beft", "bitfit")  # of layers with a bias, which these two models do not have
)
FEW = ["lora", "loha", "oft", "ia3"]


def llama():
    if not LLAMA.is_dir():
        pytest.skip(f"{LLAMA} is not there: it is no part of the repository")
    return AutoModelForCausalLM.from_pretrained(LLAMA), AutoTokenizer.from_pretrained(LLAMA), "CAUSAL_LM"


def t5():
    model, tokenizer = load_base()
    return model, tokenizer, "SEQ_2_SEQ_LM"


BASES = {"llama": (llama, ["q_proj", "down_proj"], str(LLAMA)), "t5": (t5, ["q", "wo"], "demo")}


def trained(folder, config, base="llama"):
    """An adapter with weights of its own, in a folder with its tokenizer."""
    make, _, name = BASES[base]
    model, tokenizer, config.task_type = make()
    adapted = d.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.peft_config["default"].base_model_name_or_path = name
    adapted.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    return str(folder)


def lora(r=4, target_modules=("q_proj", "down_proj"), **options):
    return d.LoraConfig(r=r, target_modules=list(target_modules), **options)


def usual(name, base="llama"):
    """A config of a method on two kinds of layers; other layers where it has its own."""
    method = METHODS[d.PeftType[name.upper()]]
    options = {"target_modules": BASES[base][1], **NEEDED.get(name, {})}
    if name == "ia3":
        options["feedforward_modules"] = BASES[base][1][1:]
    return method.config(**options)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in MERGEABLE])
def test_every_method_that_a_weight_can_hold(name, base, tmp_path):
    adapter = trained(tmp_path / "adapter", usual(name, base), base)
    merged = merge_to_folder(adapter, tmp_path / "merged", inputs=TEXTS)
    assert merged.proof.holds
    assert merged.proof.positions > 4
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    converted = convert_adapter(adapter, tmp_path / "lora", inputs=TEXTS)
    assert converted.proof.holds
    assert max(converted.errors.values()) <= 1e-5
    assert d.PeftConfig.from_pretrained(tmp_path / "lora").peft_type == "LORA"


@pytest.mark.parametrize("to", ["peft", "vllm", "sglang", "gguf", "ollama"])
@pytest.mark.parametrize(
    "config",
    [
        lora(rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 20}),
        lora(use_dora=True),
        lora(use_rslora=True, target_modules=["q_proj"]),
        lora(init_lora_weights="pissa"),
        d.LoKrConfig(r=2, target_modules=["k_proj", "v_proj"]),
    ],
    ids=["patterns", "dora", "rslora", "pissa", "lokr"],
)
def test_what_is_exported_says_the_same(to, config, tmp_path):
    made = export_adapter(trained(tmp_path / "adapter", config), tmp_path / "out", to, inputs=TEXTS)
    assert made.proof.holds
    assert made.proof.kl < 1e-6
    if to in ("vllm", "sglang", "peft"):
        done = CliRunner().invoke(app, ["doctor", str(tmp_path / "out"), "--for", to])
        assert done.exit_code == 0, done.output


# a change of the embedding is nothing that these two programs add to a model
EVERYWHERE = [name for name in MERGEABLE if name != "trainable_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize(("base", "to"), [("llama", "peft"), ("llama", "vllm"), ("llama", "gguf"), ("t5", "peft")])
@pytest.mark.parametrize("name", EVERYWHERE)
def test_every_method_is_exported_or_refused_with_a_reason(name, base, to, tmp_path):
    if to == "gguf":
        pytest.importorskip("gguf")
    adapter = trained(tmp_path / "adapter", usual(name, base), base)
    if (name, to) == ("diff_pruning", "peft"):  # mergeable, no LoRA of a rank worth it, and not in PEFT
        with pytest.raises(ExportError, match="DIFF_PRUNING is none of PEFT's methods"):
            export_adapter(adapter, tmp_path / "out", to, inputs=TEXTS)
        assert not (tmp_path / "out").exists()
        return
    made = export_adapter(adapter, tmp_path / "out", to, inputs=TEXTS)
    assert made.proof.holds and made.proof.positions > 4


def test_a_gguf_adapter_as_the_package_reads_it(tmp_path):
    gguf = pytest.importorskip("gguf")
    adapter = trained(tmp_path / "adapter", lora(target_modules=["q_proj", "k_proj", "o_proj"], use_rslora=True))
    export_adapter(adapter, tmp_path / "out", "gguf", inputs=TEXTS)
    reader = gguf.GGUFReader(str(tmp_path / "out" / "adapter.gguf"))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama"
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert len(tensors) == 5 * 3 * 2
    file = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    heads = {"attn_q": ("q_proj", 8), "attn_k": ("k_proj", 4), "attn_output": ("o_proj", None)}
    for name, (leaf, count) in heads.items():
        root = f"base_model.model.model.layers.2.self_attn.{leaf}"
        change = 4 * file[f"{root}.lora_B.weight"] @ file[f"{root}.lora_A.weight"]  # 8 / sqrt(4)
        if count is not None:  # llama.cpp pairs neighbours in a head where transformers pairs halves
            change = torch.cat(
                [half.reshape(2, -1, 64).transpose(0, 1).reshape(-1, 64) for half in change.chunk(count)]
            )
        a, b = tensors[f"blk.2.{name}.weight.lora_a"], tensors[f"blk.2.{name}.weight.lora_b"]
        scale = fields["adapter.lora.alpha"] / len(a)
        torch.testing.assert_close(scale * b @ a, change, atol=1e-5, rtol=1e-4)


def test_turning_rows_and_back():
    from types import SimpleNamespace

    base = SimpleNamespace(config=SimpleNamespace(num_attention_heads=4, num_key_value_heads=2))
    kind, rows = SimpleNamespace(turned=True), torch.arange(16.0).reshape(16, 1)
    there = turned("layers.0.q_proj", rows, kind, base)
    assert there.flatten().tolist()[:4] == [0, 2, 1, 3]
    assert torch.equal(turned("layers.0.q_proj", there, kind, base, back=True), rows)
    assert torch.equal(turned("layers.0.v_proj", rows, kind, base), rows)


# ----------------------------------------------------------------------------------------------------- planted faults


@pytest.fixture
def adapter(tmp_path):
    return trained(tmp_path / "adapter", lora())


def refused(make, out):
    """The message; nothing is left of the folder."""
    with pytest.raises(ProofError) as caught:
        make()
    assert not out.exists()
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]
    return str(caught.value)


def test_a_skipped_layer_is_caught_and_named(adapter, tmp_path, monkeypatch):
    real = d.PeftModel.merge_and_unload

    def skipping(self, **options):
        layer = self.get_base_model().get_submodule("model.layers.3.mlp.down_proj")
        with torch.no_grad():
            layer.adapters["default"].lora_B.weight.zero_()
        return real(self, **options)

    monkeypatch.setattr(d.PeftModel, "merge_and_unload", skipping)
    out = tmp_path / "out"
    message = refused(lambda: merge_to_folder(adapter, out, inputs=TEXTS), out)
    assert "first at model.layers.3.mlp.down_proj" in message
    assert "KL divergence" in message


def test_a_wrong_scale_is_caught(adapter, tmp_path, monkeypatch):
    real = servers.uniform

    def scaled(model, together):
        config, tensors = real(model, together)
        return config, {key: 2 * t if "lora_B" in key else t for key, t in tensors.items()}

    monkeypatch.setattr(servers, "uniform", scaled)
    out = tmp_path / "out"
    message = refused(lambda: export_adapter(adapter, out, "sglang", inputs=TEXTS), out)
    assert "first at model.layers.0.self_attn.q_proj" in message


def test_a_wrong_scale_in_a_gguf_file_is_caught(adapter, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    real = gguf_target.write_file

    def scaled(file, kind, config, tensors, base):
        return real(file, kind, replace(config, lora_alpha=2 * config.lora_alpha), tensors, base)

    monkeypatch.setattr(gguf_target, "write_file", scaled)
    out = tmp_path / "out"
    assert "KL divergence" in refused(lambda: export_adapter(adapter, out, "gguf", inputs=TEXTS), out)


def test_a_layer_that_conversion_skips_is_caught_and_named(tmp_path, monkeypatch):
    real = converting.save_as_lora

    def skipping(folder, *rest, **options):
        errors = real(folder, *rest, **options)
        file = folder / "adapter_model.safetensors"
        tensors = {key: t * 0 if "layers.2.mlp.down_proj.lora_B" in key else t for key, t in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
        return errors

    adapter = trained(tmp_path / "adapter", usual("loha"))
    monkeypatch.setattr(converting, "save_as_lora", skipping)
    out = tmp_path / "out"
    message = refused(lambda: convert_adapter(adapter, out, inputs=TEXTS), out)
    assert "first at model.layers.2.mlp.down_proj" in message


def test_another_template_is_caught(adapter, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(adapter)
    real = merging._again

    def changed(folder, *rest):
        other = AutoTokenizer.from_pretrained(folder)
        other.chat_template = "{% for m in messages %}<user>{{ m.content }}{% endfor %}"
        other.save_pretrained(folder)
        return real(folder, *rest)

    monkeypatch.setattr(merging, "_again", changed)
    out = tmp_path / "out"
    assert "chat template" in refused(lambda: merge_to_folder(adapter, out, inputs=TEXTS), out)


def test_other_special_tokens_and_other_prompts_are_caught(adapter, tmp_path, monkeypatch):
    real = merging._again

    def changed(folder, *rest):
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": "<unk>", "add_bos_token": False}))
        (folder / "settings.json").write_text(
            json.dumps({"task": "causal", "separator": " Answer:", "model_name_or_path": str(LLAMA)})
        )
        return real(folder, *rest)

    monkeypatch.setattr(merging, "_again", changed)
    out = tmp_path / "out"
    message = refused(lambda: merge_to_folder(adapter, out, inputs=TEXTS), out)
    assert "eos_token is" in message
    assert "prompt 1 becomes other tokens" in message


def test_damage_on_the_way_to_the_disk_is_caught(adapter, tmp_path, monkeypatch):
    real = merging._again

    def changed(folder, *rest):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1.1
        save_file(tensors, file, {"format": "pt"})
        return real(folder, *rest)

    monkeypatch.setattr(merging, "_again", changed)
    out = tmp_path / "out"
    assert "first at model.layers.1.mlp.up_proj" in refused(lambda: merge_to_folder(adapter, out, inputs=TEXTS), out)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_no_weight_can_hold_is_refused_and_leaves_nothing(tmp_path):
    folder = trained(tmp_path / "prefix", d.PrefixTuningConfig(num_virtual_tokens=3))
    with pytest.raises(MergeError, match="no weight can hold"):
        merge_to_folder(folder, tmp_path / "out")
    with pytest.raises(ConversionError):
        export_adapter(folder, tmp_path / "out", "gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prefix"]


def test_what_is_there_is_never_replaced(adapter, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(SaveError, match="is there already"):
        merge_to_folder(adapter, mine)
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]


def test_what_a_program_has_no_way_to_do_is_refused(tmp_path):
    folder = trained(tmp_path / "whole", lora(modules_to_save=["lm_head"]))
    done = CliRunner().invoke(app, ["export", folder, str(tmp_path / "out"), "--to", "vllm"])
    assert done.exit_code == 2, done.output
    assert "deltatune merge" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_verbs(adapter, tmp_path):
    run = CliRunner()
    out = tmp_path / "out"
    merged = run.invoke(app, ["merge", adapter, str(out), "-i", TEXTS[0]])
    assert merged.exit_code == 0, merged.output
    assert "prompts and special tokens are the same" in " ".join(merged.stdout.split())
    assert run.invoke(app, ["merge", adapter, str(out)]).exit_code == 4
    answered = run.invoke(app, ["generate", str(out), TEXTS[0], "--max-new-tokens", "4"])
    assert answered.stdout == run.invoke(app, ["generate", adapter, TEXTS[0], "--max-new-tokens", "4"]).stdout
    lossy = run.invoke(app, ["convert", adapter, str(tmp_path / "one"), "--rank", "1", "--tolerance", "1e-9"])
    assert lossy.exit_code == 2
    assert "KL divergence" in lossy.stderr
    wrong = run.invoke(app, ["export", adapter, str(tmp_path / "x"), "--to", "vlm"])
    assert wrong.exit_code == 2
    assert "did you mean 'vllm'" in wrong.stderr
