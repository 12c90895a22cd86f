"""LoftQ on a base that is quantised already: s B A is the best answer of rank r to W - Q, from the file of W."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from deltatune import LoraConfig, PeftModel, get_peft_model, replace_lora_weights_loftq
from deltatune.errors import FormatError, MismatchError, StateError

bnb = pytest.importorskip("bitsandbytes")
LAYERS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A model and the folder of its weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 60}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4)).eval()
    folder = tmp_path_factory.mktemp("full")
    model.save_pretrained(folder)
    return model, folder


def quantised(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for path, layer in list(model.named_modules()):
        if path.endswith(tuple(LAYERS)):
            packed = bnb.nn.Linear4bit(layer.in_features, layer.out_features, False, torch.float32, quant_type="nf4")
            packed.load_state_dict(layer.state_dict())
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, packed.to("cpu"))
    return model.eval()


def adapted(model: nn.Module, **options) -> PeftModel:
    return get_peft_model(
        quantised(model), LoraConfig(target_modules=LAYERS, **{"r": 8, "lora_alpha": 8, **options})
    ).eval()


@pytest.mark.parametrize("alpha", [8, 32])
def test_the_factors_answer_what_quantising_lost_whatever_the_scaling(full, alpha):
    base, folder = full
    model = adapted(base, lora_alpha=alpha)
    replace_lora_weights_loftq(model, str(folder))
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        layer = model.get_base_model().get_submodule(path)
        lost = base.get_submodule(path).weight - layer.as_map().weight
        U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
        lora = layer.adapters["default"]
        assert_close(lora.scaling * lora.B @ lora.A, (U[:, :8] * S[:8]) @ Vh[:8], rtol=1e-4, atol=1e-6)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        goal, better = base(ids).logits, model(ids).logits
        with model.disable_adapter():
            worse = model(ids).logits
        assert torch.equal(worse, quantised(base)(ids).logits)
    assert (better - goal).norm() < 0.95 * (worse - goal).norm()


def test_a_callback_decides_layer_by_layer_what_stays(full):
    base, folder = full
    model = adapted(base)
    before = {k: t.clone() for k, t in model.adapter_tensors("default").items()}
    seen = []
    replace_lora_weights_loftq(
        model, folder / "model.safetensors", callback=lambda m, name: seen.append(name) or "q_proj" in name
    )
    assert seen[0] == "model.layers.0.self_attn.q_proj" and len(seen) == 4
    for key, tensor in model.adapter_tensors("default").items():
        assert torch.equal(tensor, before[key]) is ("down_proj" in key)


def test_shards_and_keys_without_the_models_prefix_are_read(full, tmp_path):
    base, folder = full
    tensors = {key.removeprefix("model."): tensor for key, tensor in load_file(folder / "model.safetensors").items()}
    names = sorted(tensors)
    places = {name: f"model-{1 + (place > len(names) // 2)}.safetensors" for place, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    one, two = adapted(base), adapted(base)
    replace_lora_weights_loftq(one, str(folder))
    replace_lora_weights_loftq(two, str(tmp_path))
    for key, tensor in one.adapter_tensors("default").items():
        assert torch.equal(tensor, two.adapter_tensors("default")[key])


def test_a_wrong_file_changes_nothing(full, tmp_path):
    base, folder = full
    model = adapted(base)
    before = {k: t.clone() for k, t in model.adapter_tensors("default").items()}
    tensors = load_file(folder / "model.safetensors")
    last = "model.layers.1.self_attn.q_proj.weight"
    save_file({**tensors, last: tensors[last][:8]}, tmp_path / "model.safetensors")
    with pytest.raises(MismatchError, match="has shape"):
        replace_lora_weights_loftq(model, str(tmp_path))
    save_file({key: tensor for key, tensor in tensors.items() if key != last}, tmp_path / "model.safetensors")
    with pytest.raises(MismatchError, match=r"holds no model.layers.1.self_attn.q_proj.weight"):
        replace_lora_weights_loftq(model, str(tmp_path))
    with pytest.raises(FormatError, match="is not there"):
        replace_lora_weights_loftq(model, str(tmp_path / "nowhere"))
    with pytest.raises(FormatError, match="pass model_path"):
        replace_lora_weights_loftq(adapted(base))
    with pytest.raises(StateError, match="is on no quantised layer"):
        replace_lora_weights_loftq(get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=LAYERS)), str(folder))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.adapter_tensors("default").items())


@pytest.mark.parametrize("init", ["pissa", "olora", "mica", "orthogonal"])
def test_the_other_starts_decompose_the_values_of_a_quantised_base_and_leave_its_codes(full, init, tmp_path):
    base, ids = full[0], torch.arange(12)[None]
    model = adapted(base, init_lora_weights=init)
    with torch.no_grad():
        # in training mode, whose kernel does not round inputs to bfloat16 on CPUs that can
        plain = quantised(base).train()(ids).logits
        assert_close(model.train()(ids).logits, plain, rtol=0, atol=0 if init != "orthogonal" else 1e-6)
        expected, model = quantised(base)(ids).logits, model.eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(quantised(base), tmp_path)
        assert torch.equal(loaded(ids).logits, model(ids).logits) and not torch.equal(model(ids).logits, expected)
        assert torch.equal(model.unload()(ids).logits, expected)
