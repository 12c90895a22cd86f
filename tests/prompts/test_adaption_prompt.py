"""LLaMA-Adapter: the paper's equation on every kind of attention, its start, files, refusals, and others beside it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deltatune import AdaptionPromptConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from deltatune.errors import ConfigError, DataError, MismatchError, TargetError
from deltatune.prompts.attention import Recorder
from deltatune.prompts.capture import capture
from deltatune.prompts.gates import Gates
from deltatune.trace import trace
from deltatune.trace.samples import example
from tests.prompts.models import KINDS, activate_together, bare, batch, redraw

REACHED = ["gpt2", "llama", "glm", "mistral", "recurrent", "bert", "albert", "t5", "bart"]
TEXT = [9, 33, 12, 40]


def gated(name: str, base: nn.Module | None = None, moved: bool = True, **settings) -> PeftModel:
    torch.manual_seed(0)
    config = AdaptionPromptConfig(task_type=KINDS[name][1], **{"adapter_len": 3, **settings})
    model = get_peft_model(bare(name) if base is None else base, config)
    if moved:
        redraw(model)
    return model.eval()


def logits(model, name: str, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**{**batch(name), **inputs}).logits


class Queries(Recorder):
    def __init__(self) -> None:
        self.seen: dict[int, torch.Tensor] = {}

    def record(self, module, query, key, value) -> None:
        self.seen[id(module)] = query


@pytest.mark.parametrize(
    ("name", "k", "v", "o", "heads"),
    [
        ("gpt2", (1, "c_attn"), (2, "c_attn"), "c_proj", 4),
        ("llama", (0, "k_proj"), (0, "v_proj"), "o_proj", 2),
        ("bert", (0, "key"), (0, "value"), None, 4),
        ("t5", (0, "k"), (0, "v"), "o", 4),
        ("bart", (0, "k_proj"), (0, "v_proj"), "out_proj", 4),
    ],
)
def test_the_last_module_adds_the_equation_of_the_paper(name, k, v, o, heads):
    model = gated(name, adapter_layers=1)
    site = model.prompts["default"].sites[-1].name
    module = model.get_base_model().get_submodule(site)
    outputs: list[torch.Tensor] = []
    handle = module.register_forward_hook(
        lambda _, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    logits(model, name)
    with Queries() as queries:  # who listens hears the base model
        logits(model, name)
    handle.remove()
    query = queries.seen[id(module)]  # (B, H, Q, d), rotated as the model does
    learned = model.prompt_encoder["default"][0]
    with torch.no_grad():
        key, value = (
            getattr(module, child)(learned.adaption_prompt).chunk(3, -1)[part] if name == "gpt2"
            else getattr(module, child)(learned.adaption_prompt)
            for part, child in (k, v)
        )  # fmt: skip
        dim = query.shape[-1]
        key, value = (x.view(1, 3, heads, dim).transpose(1, 2).repeat_interleave(query.shape[1] // heads, 1)
                      for x in (key, value))  # fmt: skip
        scores = query @ key.mT / (1 if name == "t5" else dim**0.5)
        extra = (learned.adaption_gate * scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        if o is not None:
            projection = getattr(module, o)
            extra = projection(extra) - projection(torch.zeros_like(extra))
    torch.testing.assert_close(outputs[0] - outputs[1], extra, atol=1e-5, rtol=1e-4)
    assert extra.abs().max() > 0.01


@pytest.mark.parametrize("name", REACHED)
def test_a_fresh_adapter_is_the_base_bit_for_bit_and_a_moved_one_is_when_disabled(name):
    expected = logits(bare(name), name)
    assert torch.equal(logits(gated(name, moved=False), name), expected)
    model = gated(name)
    assert (logits(model, name) - expected).abs().max() > 0.01
    with model.disable_adapter():
        assert torch.equal(logits(model, name), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_prompts_and_gates_train_and_nothing_else(name):
    model = gated(name, moved=False).train()
    if name != "bert":
        width = 32
        assert model.get_nb_trainable_parameters()[0] == 2 * (3 * width + 1)
    before = {key: value.clone() for key, value in bare(name).named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    encoder = model.prompt_encoder["default"]
    for step in range(2):
        optimizer.zero_grad()
        model(**batch(name)).logits.square().mean().backward()
        for learned in encoder:
            assert learned.adaption_gate.grad.abs().max() > 0
            assert (learned.adaption_prompt.grad.abs().max() > 0) == (step > 0)  # it waits for the gate
        optimizer.step()
    after = dict(model.unload().named_parameters())
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_checkpointing_keeps_the_gradients(name):
    found = []
    for checkpointed in (False, True):
        model = gated(name, bare(name).double()).double().train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(**batch(name)).logits.square().mean().backward()
        found.append([p.grad for p in model.prompt_encoder.parameters()])
    torch.testing.assert_close(found[1], found[0], atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generation_agrees_with_and_without_cache(name):
    model = gated(name)
    for learned in model.prompt_encoder["default"]:
        learned.adaption_gate.data.fill_(3)
    inputs = {k: v for k, v in batch(name, left=name != "t5").items() if not k.startswith("decoder")}
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), expected)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**inputs, **options), expected)


def test_padding_changes_nothing():
    model = gated("llama")
    alone = batch("llama")["input_ids"][1:, :5]
    with torch.no_grad():
        torch.testing.assert_close(logits(model, "llama")[1:, :5], model(input_ids=alone).logits, atol=1e-5, rtol=1e-5)


def test_copies_are_equal_and_independent():
    model = gated("llama")
    expected = logits(model, "llama")
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(clone, "llama"), expected)
        clone.prompt_encoder["default"][0].adaption_gate.data.zero_()
        assert not torch.equal(logits(clone, "llama"), expected)
    assert torch.equal(logits(model, "llama"), expected)


@pytest.mark.slow
def test_a_compiled_pass_is_one_graph_and_the_same():
    model = gated("llama")
    expected = logits(model, "llama")
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, "llama"), expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- beside others


def test_a_prompt_goes_through_projections_as_lora_has_changed_them():
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "q_proj"], init_lora_weights=False)
    prompts = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3)

    def with_lora(base: nn.Module) -> PeftModel:
        torch.manual_seed(1)
        return get_peft_model(base, copy.deepcopy(config), adapter_name="lora")

    expected = logits(gated("llama", with_lora(bare("llama")).merge_and_unload()), "llama")
    first, then = gated("llama"), with_lora(bare("llama"))
    torch.manual_seed(1)
    first.add_adapter("lora", copy.deepcopy(config))
    then.add_adapter("default", copy.deepcopy(prompts))
    redraw(then)
    for model in (first, then):
        model.set_adapter(["default", "lora"])
        torch.testing.assert_close(logits(model.eval(), "llama"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_a_prefix_beside_it_is_that_prefix_on_the_gated_model(name):
    model = gated(name)
    model.add_adapter("prefix", PrefixTuningConfig(task_type=KINDS[name][1], num_virtual_tokens=2))
    alone = logits(model, name)
    activate_together(model, ["default", "prefix"])
    both = logits(model, name)
    model.set_adapter("prefix")
    prefix = logits(model, name)
    assert (both - alone).abs().max() > 0.01 and (both - prefix).abs().max() > 0.01
    for learned in model.prompt_encoder["default"]:
        learned.adaption_gate.data.zero_()
    activate_together(model, ["default", "prefix"])
    assert torch.equal(logits(model, name), prefix)


def test_two_adapters_do_not_touch_each_other_and_add_up_when_both_are_active():
    model = gated("llama", adapter_layers=1)
    first = logits(model, "llama")
    config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=5, adapter_layers=1)
    model.add_adapter("b", config)
    model.set_adapter("b")
    model.prompt_encoder["b"][0].adaption_gate.data.fill_(0.7)
    second = logits(model, "llama")
    model.set_adapter("default")
    assert torch.equal(logits(model, "llama"), first)
    model.set_adapter(["default", "b"])
    assert not torch.equal(logits(model, "llama"), first)
    model.delete_adapter("default")
    assert torch.equal(logits(model, "llama"), second)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_rows_of_a_batch_have_their_own_prompt(name):
    model = gated(name)
    model.add_adapter("b", AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=5))
    for learned in model.prompt_encoder["b"]:
        learned.adaption_gate.data.fill_(0.7)
    expected = []
    for adapter in ("default", "b"):
        model.set_adapter(adapter)
        expected.append(logits(model, name))
    with torch.no_grad():
        found = model(**batch(name), adapter_names=["b", "__base__"]).logits
    torch.testing.assert_close(found[0], expected[1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], logits(bare(name), name)[1], atol=1e-5, rtol=1e-5)


def test_taken_off_leaves_the_model_as_it_was():
    for layout in ("native", "peft"):
        base = bare("gpt2")
        before = [dict(vars(module)) for module in base.modules()]
        model = gated("gpt2", base, layout=layout)
        logits(model, "gpt2")
        model.unload()
        assert [dict(vars(module)) for module in base.modules()] == before


# --------------------------------------------------------------------------------------------------------- start, files


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_a_prompt_of_text_is_projected_to_the_keys_and_values_of_the_text(name):
    model = gated(name, moved=False, adapter_len=4, init_token_ids=TEXT)
    gates: Gates = model.prompts["default"]
    pairs = capture(model.get_base_model(), gates.sites, torch.tensor([TEXT]))
    for gate, site, (key, value) in zip(gates.gates, gates.sites, pairs):
        module = model.get_base_model().get_submodule(site.name)
        heads = gate.projections.heads
        with torch.no_grad():
            made = gate.projections.value(module, gate.learned.adaption_prompt, heads[1])
            torch.testing.assert_close(made, value, atol=1e-5, rtol=1e-5)
            made = gate.projections.key(module, gate.learned.adaption_prompt, heads[0])
            first = slice(0, 1) if name == "llama" else slice(None)  # elsewhere the keys are turned
            torch.testing.assert_close(made[:, :, first], key[:, :, first], atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model, name), logits(bare(name), name))
    with pytest.raises(DataError, match=r"4 tokens, the prefix 9 virtual tokens; .* adapter_len=4"):
        gated(name, adapter_len=9, init_token_ids=TEXT)


@pytest.mark.parametrize("layout", ["native", "peft"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_what_was_saved_comes_back_bit_for_bit(name, layout, tmp_path):
    model = gated(name, layout=layout, init_token_ids=TEXT)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    own = {key for key in keys if "adaption_" in key}
    sites = [site.name for site in model.prompts["default"].sites]
    assert own == {f"base_model.model.{s}.adaption_{part}" for s in sites for part in ("prompt", "gate")}
    assert ("base_model.classifier.weight" in keys) == (name == "bert") and len(keys) == len(own) + 2 * (name == "bert")
    loaded = PeftModel.from_pretrained(bare(name), tmp_path)
    assert torch.equal(logits(loaded, name), logits(model, name))
    config = loaded.peft_config["default"]
    assert (config.layout, config.adapter_layers, config.init_token_ids) == (layout, len(sites), None)


def test_a_file_that_does_not_fit_is_refused_before_anything_changes():
    gates = gated("llama").prompts["default"]
    good = {key: tensor.detach().clone() for key, tensor in gates.file_tensors().items()}
    prompt = next(iter(good))
    for bad, reason in (
        ({prompt: good[prompt]}, "missing"),
        ({**good, "surplus.adaption_gate": good[prompt]}, "surplus"),
        ({**good, prompt: good[prompt][:, :2]}, r"has shape \(1, 2, 32\)"),
        ({**good, prompt: good[prompt] * float("nan")}, "not finite"),
    ):
        with pytest.raises(MismatchError, match=reason):
            gates.load_file_tensors({key: tensor + 1 for key, tensor in bad.items()})
        assert all(torch.equal(tensor, good[key]) for key, tensor in gates.file_tensors().items())


def test_it_can_be_traced():
    model, inputs = example("adaption_prompt", "gpt2")
    report = trace(model, inputs)
    assert report.methods[0].method == "ADAPTION_PROMPT" and report.gradient.live > 0


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "settings", "kind", "reason"),
    [
        ("qwen3", {}, TargetError, r"the keys of 'model.layers.0.self_attn' are not what a projection .* normalised"),
        ("latent", {}, TargetError, "several steps"),
        ("bloom", {}, TargetError, "outside of transformers' attention interface"),
        ("mamba", {}, TargetError, "no attention"),
        ("llama", {"adapter_layers": 3}, ConfigError, "adapter_layers=3, but LlamaForCausalLM has 2"),
        ("llama", {"target_modules": "attn"}, TargetError, "ending of none"),
        ("llama", {"adapter_len": None}, ConfigError, "adapter_len is not set"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_the_model_alone(name, settings, kind, reason):
    base = bare(name)
    before = [dict(vars(module)) for module in base.modules()]
    with pytest.raises(kind, match=reason):
        gated(name, base, **settings)
    assert [dict(vars(module)) for module in base.modules()] == before


def test_other_models_than_those_of_transformers_are_refused():
    with pytest.raises(TargetError, match="a model of transformers"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), AdaptionPromptConfig(adapter_len=2))
    with pytest.raises(ConfigError, match="adapter_len=0"):
        AdaptionPromptConfig(adapter_len=0)
    with pytest.raises(ConfigError, match="exclude each other"):
        AdaptionPromptConfig(adapter_len=2, init_text="a", init_token_ids=[1, 2])
