"""X-LoRA against arXiv 2402.07148: W x + sum_i s_i(token, layer) (alpha_i / r_i) B_i A_i x, s from hidden states."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import deltatune
from deltatune import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    XLoraConfig,
    get_peft_model,
)
from deltatune.errors import ConfigError, MergeError, StateError, TargetError
from deltatune.inject import adapted_layers
from tests.core.tiny import batch, tiny
from tests.laws.examples import base_values, same

TARGETS = {
    "llama": [["q_proj", "up_proj"], ["up_proj", "o_proj", "lm_head"]],
    "gpt2": [["c_attn"], ["c_attn", "c_fc"]],
    "bert": [["query", "value"], ["value"]],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two LoRA adapters for each architecture."""
    root, found = tmp_path_factory.mktemp("experts"), {}
    for arch, targets in TARGETS.items():
        for index, names in enumerate(targets):
            torch.manual_seed(index)
            config = LoraConfig(r=2 + index, lora_alpha=5, target_modules=names, init_lora_weights=False)
            get_peft_model(tiny(arch), config).save_pretrained(root / arch / str(index))
        found[arch] = {str(index): str(root / arch / str(index)) for index in range(len(targets))}
    return found


TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS"}


def mixed(folders, arch="llama", base=None, **options):
    torch.manual_seed(3)
    config = XLoraConfig(task_type=TASKS[arch], adapters=dict(folders[arch]), **options)
    model = get_peft_model(base or tiny(arch), config)
    with torch.no_grad():
        for parameter in model.prompt_encoder["default"].parameters():
            parameter.add_(torch.randn_like(parameter))
    return model.eval()


def unlabelled(arch="llama", **options):
    return {key: value for key, value in batch(arch, **options).items() if key != "labels"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 6},
        {"softmax_temperature": 0.3, "global_scaling_weight": 0.6, "layerwise_scalings": True},
        {"enable_softmax": False, "top_k_lora": 1},
        {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2},
    ],
    ids=str,
)
def test_every_token_has_its_own_mixture_in_every_layer(options, folders):
    """The adapted layers once more, by hooks on the bare model, token by token."""
    model, bare = mixed(folders, **options), tiny("llama")
    model, bare = model.double(), bare.double()
    inputs = unlabelled()
    classifier = model.prompt_encoder["default"].layers
    with torch.no_grad():
        h = bare(**inputs, output_hidden_states=True).hidden_states[-1]
        logits = h @ classifier[0].weight.T + classifier[0].bias
        if len(classifier) > 1:
            logits = torch.relu(logits) @ classifier[3].weight.T + classifier[3].bias
        paths = [p for p, m in model.get_base_model().named_modules() if isinstance(m, deltatune.AdaptedLayer)]
        count = len(paths)
        logits = logits.reshape(*h.shape[:2], -1, 2).expand(-1, -1, count, -1)
        s = logits
        if options.get("enable_softmax", True):
            heat = (logits / options.get("softmax_temperature", 1.0)).exp()
            s = heat / heat.sum(-1, keepdim=True)
        if options.get("top_k_lora") == 1:
            s = torch.where(s == s.max(-1, keepdim=True).values, s, 0.0)
        if options.get("enable_softmax_topk"):
            s = s.exp() / s.exp().sum(-1, keepdim=True)

        def hooked(number, experts):
            def add(module, args, output):
                (x,) = args
                for index, lora in experts.items():
                    A, B = lora.lora_A.weight, lora.lora_B.weight
                    for row in range(x.shape[0]):
                        for token in range(x.shape[1]):
                            weight = options.get("global_scaling_weight", 1.0) * s[row, token, number, int(index)]
                            output[row, token] += weight * 5 / (2 + int(index)) * (B @ (A @ x[row, token]))
                return output

            return add

        for number, path in enumerate(paths):
            layer = model.get_base_model().get_submodule(path)
            bare.get_submodule(path).register_forward_hook(hooked(number, layer.adapters["default"].experts))
        assert_close(model(**inputs).logits, bare(**inputs).logits)
    assert model.get_latest_scalings().shape == (2, 7, count, 2)


def test_what_trains_and_how_much(folders):
    model = mixed(folders, layerwise_scalings=True)
    layers = 3 * 3 + 1
    assert model.get_nb_trainable_parameters()[0] == (16 + 1) * 2 * layers
    model.train()
    model(**batch("llama")).loss.backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None}
    assert names == {"prompt_encoder.default.layers.0.weight", "prompt_encoder.default.layers.0.bias"}
    experts = mixed(folders, use_trainable_adapters=True)
    assert sum("experts" in name for name, p in experts.named_parameters() if p.requires_grad) == 2 * (6 + 7)
    model.set_adapter("default")
    assert not any(p.requires_grad for name, p in model.named_parameters() if "experts" in name)


def generated(model, **options):
    inputs = {key: value.flip(1) for key, value in unlabelled().items()}  # padding on the left
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_generation_with_a_cache_is_generation_without(arch, value, folders):
    model = mixed(folders, arch, layerwise_scalings=True, scaling_pass_value=value)
    plain = generated(model, use_cache=False)
    for options in ({}, {"cache_implementation": "static"}):
        cached = generated(model, **options)
        assert torch.equal(cached.sequences, plain.sequences)
        assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        again = model(cached.sequences, attention_mask=(cached.sequences != 0).long()).logits
    assert again.isfinite().all()


def test_beams_share_and_reorder_both_caches(folders):
    model = mixed(folders)
    options = {"num_beams": 3, "num_return_sequences": 2}
    plain, cached = generated(model, use_cache=False, **options), generated(model, **options)
    assert torch.equal(cached.sequences, plain.sequences)


def test_tokens_one_by_one_are_tokens_at_once(folders):
    model, ids = mixed(folders, layerwise_scalings=True), unlabelled()["input_ids"]
    with torch.no_grad():
        whole, cache, parts = model(input_ids=ids).logits, None, []
        for token in ids.split([3, 1, 2, 1], dim=1):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_a_cache_with_tokens_that_had_no_first_pass_is_refused(folders):
    model, ids = mixed(folders), unlabelled()["input_ids"]
    with torch.no_grad(), model.disable_adapter():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with torch.no_grad(), pytest.raises(StateError, match="holds tokens that adapter 'default' has not seen"):
        model(input_ids=ids[:, :1], past_key_values=cache)


def test_without_the_adapter_it_is_the_base(folders):
    model, inputs = mixed(folders), unlabelled()
    with torch.no_grad():
        expected = tiny("llama")(**inputs).logits
        assert not torch.allclose(model(**inputs).logits, expected, atol=1e-2)
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, expected)
        model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
        model.set_adapter("other")
        model.delete_adapter("default")
        assert torch.equal(model(**inputs).logits, expected)
        assert not vars(model.get_base_model()).get("_deltatune_xlora")


def test_rows_of_a_batch_with_different_adapters(folders):
    model, inputs = mixed(folders), unlabelled(rows=4)
    torch.manual_seed(5)
    model.add_adapter(
        "other", XLoraConfig(task_type="CAUSAL_LM", adapters=dict(folders["llama"]), layerwise_scalings=True)
    )
    model.add_adapter("lora", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    rows = ["other", "__base__", "default", "lora"]
    with torch.no_grad():
        together = model(**inputs, adapter_names=rows).logits
        for row, name in enumerate(rows):
            one = {key: value[row : row + 1] for key, value in inputs.items()}
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(**one).logits
            else:
                model.set_adapter(name)
                alone = model(**one).logits
            assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def even(folders, extra=()):
    """A mixture with equal weights, and the same as two LoRA adapters at half their alpha."""
    model = mixed(folders)
    with torch.no_grad():
        for parameter in model.prompt_encoder["default"].parameters():
            parameter.zero_()
    plain = PeftModel.from_pretrained(tiny("llama"), folders["llama"]["0"], "0")
    plain.load_adapter(folders["llama"]["1"], "1")
    for name, config in extra:
        for one in (model, plain):
            torch.manual_seed(9)
            one.add_adapter(name, copy.copy(config))
    for layer in plain.modules():
        if isinstance(layer, deltatune.AdaptedLayer):
            for name in ("0", "1"):
                if name in layer.adapters:
                    layer.adapters[name].scaling /= 2
    names = [name for name, _ in extra]
    model.set_adapter(["default", *names])
    plain.set_adapter(["0", "1", *names])
    return model.eval(), plain.eval()


@pytest.mark.parametrize(
    "extra",
    [
        [],
        [("lora", LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False))],
        [("prefix", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))],
    ],
    ids=["alone", "lora", "prefix"],
)
def test_equal_weights_are_loras_at_a_half_also_with_others_beside_them(extra, folders):
    model, plain = even(folders, extra)
    with torch.no_grad():
        assert_close(model(**unlabelled()).logits, plain(**unlabelled()).logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(generated(model).sequences, generated(plain).sequences)


def test_virtual_tokens_at_the_input_have_no_weights(folders):
    model = mixed(folders)
    model.add_adapter("prompt", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.set_adapter(["default", "prompt"])
    with pytest.raises(StateError, match="virtual tokens"):
        model(**unlabelled())
    model.set_adapter("default")
    assert model(**unlabelled()).logits.isfinite().all()


def test_gradient_checkpointing_gives_the_same_gradients(folders):
    model, found = mixed(folders, use_trainable_adapters=True), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        model(**batch("llama")).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, again in zip(*found):
        assert_close(again, plain)
    assert len(found[0]) == len(found[1]) > 10


def test_copies_are_equal_and_independent(folders):
    model, inputs = mixed(folders), unlabelled()
    with torch.no_grad():
        expected = model(**inputs).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(**inputs).logits, expected)
            for parameter in other.prompt_encoder.parameters():
                parameter.add_(1.0).mul_(-2)
            for _, layer in adapted_layers(other.get_base_model()):
                for lora in layer.adapters.values():
                    if isinstance(lora, deltatune.methods.lora.LoRA):
                        lora.lora_B.weight.mul_(2)
            assert not torch.allclose(other(**inputs).logits, expected, atol=1e-3)
            assert torch.equal(model(**inputs).logits, expected)


def test_a_folder_holds_the_experts_too(folders, tmp_path):
    model, inputs = mixed(folders, use_trainable_adapters=True), unlabelled()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path / "mixture")
        moved = (tmp_path / "mixture").rename(tmp_path / "moved")
        again = PeftModel.from_pretrained(tiny("llama"), moved)
        assert torch.equal(again(**inputs).logits, expected)
        expert = PeftModel.from_pretrained(tiny("llama"), moved / "1")
        assert expert.peft_config["default"].r == 3
        again.save_pretrained(tmp_path / "third")
        third = PeftModel.from_pretrained(tiny("llama"), tmp_path / "third", is_trainable=True).eval()
        assert torch.equal(third(**inputs).logits, expected)
        assert third.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_experts_are_numbered_by_their_names(folders):
    paths = folders["llama"]
    config = XLoraConfig(adapters={"b": paths["1"], "10": paths["1"], "a": paths["0"], "9": paths["0"]})
    assert list(get_peft_model(tiny("llama"), config).peft_config["default"].adapters) == ["9", "10", "a", "b"]


def test_pefts_verbs(folders):
    model, inputs = mixed(folders), unlabelled()
    with torch.no_grad():
        assert model.get_latest_scalings() is None
        model.enable_scalings_logging()
        first = model(**inputs).logits
        model.base_model.set_topk_lora(1)
        assert not torch.allclose(model(**inputs).logits, first, atol=1e-4)
        model.disable_scalings_logging()
        model(input_ids=inputs["input_ids"][:, :3])
    assert [tuple(entry.shape[:2]) for entry in model.get_scalings_log()] == [(2, 7), (2, 7)]
    assert model.get_bucketed_scalings_log()[7][0] == [0, 1]
    model.clear_scalings_log()
    assert model.get_scalings_log() == [] and model.get_latest_scalings().shape[1] == 3
    model.set_global_scaling_weight(0.5)
    assert model.get_global_scaling_weight() == 0.5 == model.peft_config["default"].global_scaling_weight
    model.set_scaling_pass_value(None)
    assert model.peft_config["default"].scaling_pass_value == 0.5
    with pytest.raises(ConfigError, match="top_k_lora=3"):
        model.set_topk_lora(3)


def test_a_classifier_of_texts(folders):
    model = mixed(folders, "bert", layerwise_scalings=True)
    inputs = batch("bert")
    model.train()
    model(**inputs).loss.backward()
    assert model.prompt_encoder["default"].layers[0].weight.grad.abs().sum() > 0
    assert any(p.grad is not None for name, p in model.named_parameters() if "modules_to_save" in name)


def test_half_precision_and_autocast(folders):
    model, inputs = mixed(folders, base=tiny("llama").to(torch.bfloat16)), unlabelled()
    assert next(model.prompt_encoder.parameters()).dtype == torch.float32
    with torch.no_grad():
        assert model(**inputs).logits.dtype == torch.bfloat16
    model = mixed(folders)
    with torch.autocast("cpu", torch.bfloat16):
        model.train()
        model(**batch("llama")).loss.backward()


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"adapters": {}}, ConfigError, "adapters={}"),
        ({"adapters": {"a.b": "folder"}}, ConfigError, "'a.b'"),
        ({"hidden_size": 4096}, ConfigError, "hidden_size=4096.*width 16"),
        ({"top_k_lora": 3}, ConfigError, "top_k_lora=3"),
        ({"softmax_temperature": 0.0}, ConfigError, "softmax_temperature"),
        ({"xlora_depth": 0}, ConfigError, "xlora_depth=0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_field(options, error, named, folders):
    base = tiny("llama")
    before = base_values(base)
    with pytest.raises(error, match=named):
        get_peft_model(base, XLoraConfig(**{"adapters": dict(folders["llama"]), **options}))
    assert same(base_values(base), before) and not any("adapters" in name for name, _ in base.named_modules())


def test_experts_that_cannot_be_mixed_leave_the_base_as_it_was(folders, tmp_path):
    get_peft_model(tiny("llama"), IA3Config()).save_pretrained(tmp_path / "ia3")
    get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])).save_pretrained(
        tmp_path / "whole"
    )
    base, inputs = tiny("llama"), unlabelled()
    for name, reason in (("ia3", "is IA3"), ("whole", "trains whole modules")):
        adapters = {"0": folders["llama"]["0"], "1": str(tmp_path / name)}
        with pytest.raises(ConfigError, match=reason):
            get_peft_model(base, XLoraConfig(adapters=adapters))
        assert not any(isinstance(module, deltatune.AdaptedLayer) for module in base.modules())
        assert torch.equal(base(**inputs).logits, tiny("llama")(**inputs).logits)


def test_models_without_one_sequence_of_tokens_are_refused(folders):
    adapters = dict(folders["llama"])
    with pytest.raises(TargetError, match="decoder or an encoder"):
        get_peft_model(tiny("t5"), XLoraConfig(adapters=adapters))
    with pytest.raises(TargetError, match="decoder or an encoder"):
        get_peft_model(nn.Linear(3, 3), XLoraConfig(adapters=adapters))


def test_it_is_not_merged(folders):
    with pytest.raises(MergeError, match="differs from token to token"):
        mixed(folders).merge_and_unload()
