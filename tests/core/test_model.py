"""The verbs of `PeftModel`."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import GenerationConfig

from deltatune import (
    LoraConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForSequenceClassification,
    VeraConfig,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject,
)
from deltatune.copies import TrainedCopies
from deltatune.errors import AdapterNameError, MergeError, PeftWarning, StateError
from deltatune.layer import AdaptedLayer
from tests.core.tiny import TASKS, batch, logits, tiny
from tests.laws.examples import move


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = get_peft_model(tiny("llama"), LoraConfig(task_type="CAUSAL_LM", r=4)).eval()
    made.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"]))
    move(made), move(made, name="other")
    return made


INPUTS = batch("llama")


def test_the_classes_and_where_things_are(model):
    assert type(model) is PeftModelForCausalLM and isinstance(model, PeftModel)
    base = model.get_base_model()
    assert model.base_model.model is base and type(base).__name__ == "LlamaForCausalLM"
    layer = base.model.layers[0].self_attn.q_proj
    assert isinstance(layer, AdaptedLayer) and type(layer.base_layer) is nn.Linear
    lora = layer.adapters["default"]
    assert lora.lora_A.weight.shape == (4, 16) and lora.lora_B.weight.shape == (16, 4) and lora.scaling == 2.0
    assert layer.lora_A["default"] is lora.lora_A and layer.scaling == {"default": 2.0, "other": 4.0}
    assert model.config is base.config and model.device == base.device and model.dtype == base.dtype
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"} and model.peft_type == "LORA"


def test_adapters_are_added_switched_and_deleted(model):
    outputs = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        assert model.active_adapters == [name] and model.active_adapter == name
        outputs[name] = logits(model, INPUTS)
    model.set_adapter(["default", "other"])
    both = logits(model, INPUTS)
    assert model.active_adapters == ["default", "other"]
    with model.disable_adapter():
        assert not model.has_active_enabled_adapter
        base = logits(model, INPUTS)
    assert torch.equal(base, logits(tiny("llama"), INPUTS))
    different = [outputs["default"], outputs["other"], both, base]
    assert not any(torch.allclose(a, b) for i, a in enumerate(different) for b in different[:i])
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model, INPUTS), outputs["default"])
    assert type(model.get_base_model().model.layers[0].mlp.down_proj) is nn.Linear, "an empty wrapper is taken off"
    for call in (model.set_adapter, model.delete_adapter):
        with pytest.raises(AdapterNameError, match=r"no adapter named 'other'; there are \['default'\]"):
            call("other")


def test_disabled_calls_may_be_nested(model):
    expected = logits(model, INPUTS)
    with model.disable_adapter():
        base = logits(model, INPUTS)
        with model.disable_adapter():
            assert torch.equal(logits(model, INPUTS), base)
        assert torch.equal(logits(model, INPUTS), base)
    assert torch.equal(logits(model, INPUTS), expected)
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        1 / 0
    assert torch.equal(logits(model, INPUTS), expected)


def test_merged_switched_and_merged_again(model):
    apart = logits(model, INPUTS)
    model.base_model.merge_adapter()
    assert_close(logits(model, INPUTS), apart, rtol=1e-4, atol=1e-4)
    with pytest.warns(PeftWarning, match="nothing of"):
        model.base_model.merge_adapter()
    kept = {layer: layer.stash.weight for _, layer in inject.adapted_layers(model.get_base_model()) if layer.merged}
    model.base_model.merge_adapter(["other"])
    assert kept and all(layer.stash.weight is weight for layer, weight in kept.items())
    both = logits(model, INPUTS)
    model.base_model.unmerge_adapter()
    model.base_model.merge_adapter(["default", "other"])
    assert torch.equal(logits(model, INPUTS), both) and not torch.allclose(both, apart, atol=1e-3)
    model.base_model.unmerge_adapter()
    model.base_model.merge_adapter()
    with pytest.raises(StateError, match="is merged"):
        model.delete_adapter("default")
    with pytest.raises(StateError, match="merged"):
        model.add_adapter("third", LoraConfig(r=2))
    assert list(model.peft_config) == ["default", "other"]
    model.set_adapter("other")  # unmerges
    assert get_model_status(model).merged_adapters == []
    model.set_adapter("default")
    assert torch.equal(logits(model, INPUTS), apart)
    with pytest.warns(PeftWarning, match="nothing is merged"):
        model.base_model.unmerge_adapter()


def test_merge_and_unload_and_unload(model):
    apart = logits(model, INPUTS)
    twin = copy.deepcopy(model)
    plain = model.merge_and_unload()
    assert type(plain).__name__ == "LlamaForCausalLM" and not any(isinstance(m, AdaptedLayer) for m in plain.modules())
    assert_close(logits(plain, INPUTS), apart, rtol=1e-4, atol=1e-4)
    assert set(plain.state_dict()) == set(tiny("llama").state_dict())
    base = twin.unload()
    assert torch.equal(logits(base, INPUTS), logits(tiny("llama"), INPUTS))


def test_merging_chosen_adapters(model):
    model.set_adapter(["default", "other"])
    both = logits(model, INPUTS)
    with pytest.raises(AdapterNameError, match="nope"):
        model.merge_and_unload(adapter_names=["nope"])
    assert torch.equal(logits(model, INPUTS), both)
    plain = model.merge_and_unload(adapter_names=["other"])
    assert not torch.allclose(logits(plain, INPUTS), both)


def test_a_broken_layer_stops_merging_before_the_first_is_changed(model):
    with torch.no_grad():
        model.get_base_model().model.layers[2].self_attn.v_proj.adapters["default"].lora_B.weight[0] = float("inf")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(MergeError, match=r"model\.layers\.2\.self_attn\.v_proj.*not finite"):
        model.merge_and_unload(safe_merge=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_quantised_the_base_is_told_as_peft_tells_it():
    bnb, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")

    def base():
        torch.manual_seed(0)
        layers = bnb.nn.Linear4bit(64, 64, quant_type="nf4"), bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        return torch.nn.Sequential(*layers, torch.nn.Linear(64, 64)).to("cpu")

    options = {"target_modules": ["0", "1", "2"]}
    ours = get_peft_model(base(), VeraConfig(**options))
    theirs = peft.get_peft_model(base(), peft.VeraConfig(**options))  # its LoRA says nothing
    names = [layer.quantization_backend for layer in get_layer_status(ours)]
    assert (
        names == [layer.quantization_backend for layer in theirs.get_layer_status()] == ["bnb 4bit", "bnb 8bit", None]
    )
    assert get_model_status(ours).quantization_backend == theirs.get_model_status().quantization_backend == "irregular"
    backend = ours.base_model.model[0].quantization_backend
    assert (backend.backend_name, backend.supports_merge) == ("bnb 4bit", True)
    assert ours.base_model.model[2].quantization_backend is None


def test_status(model):
    layers, whole = get_layer_status(model), get_model_status(model)
    assert len(layers) == whole.num_adapter_layers == 9 and layers[0].name == "model.model.layers.0.self_attn.q_proj"
    assert layers[0].module_type == "lora.Linear" and layers[0].available_adapters == ["default", "other"]
    assert (
        layers[0].requires_grad == {"default": True, "other": False} and whole.requires_grad == layers[0].requires_grad
    )
    assert whole.base_model_type == "LlamaForCausalLM" and whole.peft_types == {"default": "LORA", "other": "LORA"}
    assert (whole.trainable_params, whole.total_params) == model.get_nb_trainable_parameters()
    assert whole.active_adapters == ["default"] and whole.enabled is True and whole.merged_adapters == []
    model.disable_adapter_layers()
    assert get_model_status(model).enabled is False
    model.enable_adapter_layers()
    model.base_model.merge_adapter()
    assert model.get_model_status().merged_adapters in (["default"], "irregular")
    assert model.get_layer_status()[0].merged_adapters == ["default"]


def test_generate_and_rows(model):
    ids = INPUTS["input_ids"]
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert alone.shape[1] == ids.shape[1] + 4
    mixed = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0,
        adapter_names=["default", "__base__"],
    )  # fmt: skip
    with model.disable_adapter():
        base = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0
        )
    assert torch.equal(mixed[0], alone[0]) and torch.equal(mixed[1], base[1])
    beams = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, num_beams=2, pad_token_id=0,
        adapter_names=["default", "other"],
    )  # fmt: skip
    assert beams.shape[0] == 2
    settings = GenerationConfig(max_new_tokens=3, num_beams=2, pad_token_id=0, eos_token_id=None)
    by_place = model.generate(ids, settings, adapter_names=["default", "other"])
    assert torch.equal(by_place, model.generate(ids, generation_config=settings, adapter_names=["default", "other"]))


# ----------------------------------------------------------------------------------------------------- modules_to_save


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return get_peft_model(tiny("bert"), LoraConfig(task_type="SEQ_CLS", r=4)).eval()


def test_a_classifiers_head_is_trained_as_a_copy(classifier, tmp_path):
    assert type(classifier) is PeftModelForSequenceClassification
    head = classifier.get_base_model().classifier
    assert isinstance(head, TrainedCopies) and not head.original_module.weight.requires_grad
    assert classifier.modules_to_save >= {"classifier"}
    inputs, base = batch("bert"), tiny("bert")
    original = base.classifier.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in classifier.parameters() if p.requires_grad], lr=0.5)
    classifier(**inputs).loss.backward()
    optimizer.step()
    assert torch.equal(head.original_module.weight, original) and not torch.equal(head.weight, original)
    trained = logits(classifier, inputs)
    with classifier.disable_adapter():
        assert torch.equal(logits(classifier, inputs), logits(base, inputs)), "disabled is the base, head included"
    classifier.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("bert"), tmp_path)
    assert torch.equal(logits(loaded, inputs), trained)
    plain = classifier.merge_and_unload()
    assert type(plain.classifier) is nn.Linear
    assert_close(logits(plain, inputs), trained, rtol=1e-4, atol=1e-5)


def test_each_adapter_has_its_own_head(classifier):
    inputs = batch("bert")
    classifier.add_adapter("other", LoraConfig(task_type="SEQ_CLS", r=4))
    with torch.no_grad():
        for p in classifier.get_base_model().classifier.modules_to_save["other"].parameters():
            p.add_(1)
    first = logits(classifier, inputs)
    classifier.set_adapter("other")
    assert not torch.allclose(logits(classifier, inputs), first)
    trains = [name for name, p in classifier.named_parameters() if p.requires_grad and "classifier" in name]
    assert len(trains) == 2 and all(".other." in name for name in trains)
    with pytest.warns(PeftWarning, match="that of 'other' alone acts and trains"):
        classifier.set_adapter(["default", "other"])
    classifier(**inputs).logits.sum().backward()
    heads = classifier.get_base_model().classifier.modules_to_save
    assert all(p.grad is None for p in heads["default"].parameters())
    assert all(p.grad is not None for p in heads["other"].parameters())
    classifier.delete_adapter("default")
    classifier.delete_adapter("other")
    assert type(classifier.get_base_model().classifier) is nn.Linear


@pytest.mark.parametrize("arch", ["gpt2", "llama", "t5", "bart"])
def test_embeddings_tied_to_the_head_can_be_trained_whole(arch, tmp_path):
    name = {"gpt2": "wte", "llama": "embed_tokens", "t5": "shared", "bart": "shared"}[arch]
    model = get_peft_model(tiny(arch), LoraConfig(task_type=TASKS[arch], modules_to_save=[name])).eval()
    inputs = batch(arch)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(arch), tmp_path), inputs), expected)


# ---------------------------------------------------------------------------------------------------------------- dtype


@pytest.mark.parametrize("arch", ["llama", "t5", "bert"])
def test_a_half_precision_base_keeps_float32_adapters_and_trains(arch):
    model = get_peft_model(tiny(arch).to(torch.bfloat16), LoraConfig(task_type=TASKS[arch], r=4))
    lora = [p for name, p in model.named_parameters() if "lora_" in name]
    assert lora and all(p.dtype == torch.float32 for p in lora)
    out = model(**batch(arch))
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lora)
    model = get_peft_model(tiny(arch).to(torch.bfloat16), LoraConfig(r=4), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
