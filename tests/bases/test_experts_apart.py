"""Adapters with experts apart: those of transformers 4 on today's models, and the tensors that vLLM loads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from deltatune import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from deltatune.errors import ConfigError, MismatchError, TargetError
from tests.bases.test_experts import config, fused, logits, moved
from tests.core.moe import moe

W, P = ("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")
KINDS = {"mixtral": ("block_sparse_moe", W, 24), "qwen3_moe": ("mlp", P, 8)}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ROOT = "base_model.model.model.layers"


def old_tensors(name, r=2, experts=4, seed=0, keys=None):
    """Factors of every expert's layers, drawn, as an adapter of transformers 4 has them."""
    container, names, inner = KINDS[name]
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for expert in range(experts):
            for part in names:
                sides = (16, inner) if part != names[2] else (inner, 16)
                start = f"{ROOT}.{layer}.{container}.experts.{expert}.{part}"
                tensors[f"{start}.lora_A.weight"] = 0.3 * torch.randn(r, sides[0], generator=draw)
                tensors[f"{start}.lora_B.weight"] = 0.3 * torch.randn(sides[1], r, generator=draw)
    return tensors


def old_folder(folder, name, tensors, **options):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": list(KINDS[name][1]), **options}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def by_hand(name, tensors, scale):
    """The base with the update of each expert's layers in its own part of the joint parameter."""
    plain, (container, (gate, up, down), inner) = moe(name), KINDS[name]
    for index, layer in enumerate(plain.model.layers):
        experts = layer.mlp.experts
        for e in range(4):

            def update(part, index=index, e=e):
                start = f"{ROOT}.{index}.{container}.experts.{e}.{part}"
                if f"{start}.lora_A.weight" not in tensors:
                    return 0.0
                return scale * tensors[f"{start}.lora_B.weight"] @ tensors[f"{start}.lora_A.weight"]

            with torch.no_grad():
                experts.gate_up_proj[e, :inner] += update(gate)
                experts.gate_up_proj[e, inner:] += update(up)
                experts.down_proj[e] += update(down)
    return plain


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_of_transformers_4_does_what_it_did(name, rslora, tmp_path):
    tensors = old_tensors(name)
    model = PeftModel.from_pretrained(moe(name), old_folder(tmp_path, name, tensors, use_rslora=rslora))
    assert_close(logits(model), logits(by_hand(name, tensors, 3 / 2**0.5 if rslora else 1.5)), **CLOSE)
    assert set(model.peft_config["default"].target_parameters) == {"experts.gate_up_proj", "experts.down_proj"}
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(moe(name), tmp_path / "again")), logits(model))


@pytest.mark.parametrize("name", KINDS)
def test_written_apart_again_it_has_the_same_tensors(name, tmp_path):
    tensors = old_tensors(name)
    model = PeftModel.from_pretrained(moe(name), old_folder(tmp_path, name, tensors))
    model.save_pretrained(tmp_path / "apart", format="per_expert")
    again = load_file(tmp_path / "apart" / "adapter_model.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)
    values = json.loads((tmp_path / "apart" / "adapter_config.json").read_text())
    assert values["target_modules"] == sorted(KINDS[name][1]) and values["target_parameters"] is None
    assert (values["r"], values["lora_alpha"], values["rank_pattern"], values["alpha_pattern"]) == (2, 3, {}, {})


def test_experts_without_factors_stay_as_they_are(tmp_path):
    tensors = {key: value for key, value in old_tensors("mixtral").items() if ".experts.2." not in key}
    model = PeftModel.from_pretrained(moe("mixtral"), old_folder(tmp_path, "mixtral", tensors))
    assert_close(logits(model), logits(by_hand("mixtral", tensors, 1.5)), **CLOSE)


def test_more_experts_than_the_model_has_are_refused(tmp_path):
    folder = old_folder(tmp_path, "mixtral", old_tensors("mixtral", experts=6))
    with pytest.raises(MismatchError, match="experts 0 to 5"):
        PeftModel.from_pretrained(moe("mixtral"), folder)


def test_a_state_dict_of_single_experts_fills_an_adapter():
    model = get_peft_model(moe("mixtral"), LoraConfig(r=2, lora_alpha=3, target_modules=list(W)))
    tensors = old_tensors("mixtral")
    found = set_peft_model_state_dict(model, tensors)
    assert not found.missing_keys and not found.unexpected_keys
    assert_close(logits(model), logits(by_hand("mixtral", tensors, 1.5)), **CLOSE)


def test_half_of_a_joint_parameter_is_refused():
    with pytest.raises(ConfigError, match="'w1' of single experts is half of a parameter now"):
        get_peft_model(moe("mixtral"), LoraConfig(target_modules=["w1", "w2"]))


def test_ranks_that_differ_in_a_joint_parameter_are_refused():
    with pytest.raises(ConfigError, match=r"\[4, 8\]"):
        get_peft_model(moe("mixtral"), LoraConfig(target_modules=list(W), rank_pattern={"w3": 4}))


def test_names_of_layers_that_are_there_still_mean_those():
    """DeepSeek's first block has layers of the names that experts had."""
    model = get_peft_model(moe("deepseek_v3"), LoraConfig(r=2, target_modules=list(P)))
    layers = model.get_base_model().model.layers
    assert layers[0].mlp.gate_proj.adapters and layers[1].mlp.shared_experts.gate_proj.adapters
    assert [path for path, _ in fused(model)] == ["model.layers.1.mlp.experts"]
    dense = get_peft_model(moe("deepseek_v3"), LoraConfig(r=2, target_modules=["gate_proj"]))
    assert not fused(dense)


def test_other_methods_keep_their_targets():
    from deltatune import LoHaConfig

    with pytest.raises(TargetError, match="w1"):
        get_peft_model(moe("mixtral"), LoHaConfig(target_modules=["w1", "w3", "w2"]))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_vllm_reads_the_factors_of_each_expert_out_of_a_file(name, tmp_path):
    """The steps of `_stack_moe_lora_weights` in vllm/lora/model_manager.py, for models with `is_3d_moe_weight`."""
    model = moved(get_peft_model(moe(name), config(target_modules=["q_proj"])))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for path, layer in fused(model):
        for parameter, key in {"gate_up_proj": f"{path}.base_layer", "down_proj": path}.items():
            A, B = (tensors[f"base_model.model.{key}.lora_{which}.weight"] for which in "AB")
            A = A.reshape(4, -1, A.shape[-1])  # (E, r, in)
            B = B.reshape(B.shape[0], -1, 4).permute(2, 0, 1)  # (E, out, r)
            own = layer.adapters["default"].each[parameter]
            assert torch.equal(A, own.A) and torch.equal(B, own.B)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_written_apart_each_layer_of_an_expert_has_its_update(name, tmp_path):
    """Stacked by name, as `PackedLoRALayerWeights.pack_moe` in vllm/lora/lora_weights.py does."""
    model = moved(get_peft_model(moe(name), config()))
    model.save_pretrained(tmp_path, format="per_expert")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    container, names, _ = KINDS.get(name, ("mlp", P, 16))
    for index, (_, layer) in enumerate(fused(model)):
        each = layer.adapters["default"].each

        def stacked(part, which, index=index):
            start = f"{ROOT}.{index}.{container}.experts"
            return torch.stack([tensors[f"{start}.{e}.{part}.lora_{which}.weight"] for e in range(4)])

        joint = each["gate_up_proj"].B @ each["gate_up_proj"].A
        gate, up = (joint[:, ::2], joint[:, 1::2]) if name == "gpt_oss" else joint.chunk(2, 1)
        expected = (gate, up, each["down_proj"].B @ each["down_proj"].A)
        for part, update in zip(names, expected, strict=True):
            assert_close(stacked(part, "B") @ stacked(part, "A"), update)
    again = PeftModel.from_pretrained(moe(name), tmp_path)
    assert_close(logits(again), logits(model), **CLOSE)


def test_ranks_that_vllm_does_not_read_are_said(tmp_path):
    model = moved(get_peft_model(moe("mixtral"), config(rank_pattern={r".*\.down_proj": 4})))
    with pytest.warns(UserWarning, match="ranks or alphas of their own"):
        model.save_pretrained(tmp_path, format="per_expert")
    assert_close(logits(PeftModel.from_pretrained(moe("mixtral"), tmp_path)), logits(model), **CLOSE)


def test_a_format_that_is_none_is_refused(tmp_path):
    model = get_peft_model(moe("mixtral"), config())
    with pytest.raises(ConfigError, match="format='vllm'"):
        model.save_pretrained(tmp_path / "x", format="vllm")
    assert not (tmp_path / "x").exists()
