"""The serving form: a prefix as a cache of the bare model, and several prefixes as one."""

from __future__ import annotations

import pytest
import torch

from deltatune import (
    CartridgeConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    compose_cartridge_adapters,
    compose_prefix_folders,
    compose_prefixes,
    get_peft_model,
    initialize_kv_prefix_from_past_key_values,
    to_cache,
)
from deltatune.errors import AdapterNameError, ConfigError, DataError, MismatchError, TargetError
from tests.prompts.models import KINDS, bare, batch, prefixed, redraw
from tests.prompts.test_text import INPUT, TEXT, with_text

P = 4


def served(name: str, left: bool = False) -> dict[str, torch.Tensor]:
    """The batch as the bare model gets it beside a cache: the mask also speaks of the P entries of the cache."""
    inputs = batch(name, left)
    mask = torch.cat([torch.ones(2, P, dtype=torch.long), inputs["attention_mask"]], dim=1)
    return {**inputs, "attention_mask": mask}


# ----------------------------------------------------------------------------------------------------------- as a cache


@pytest.mark.parametrize("layout", ["native", "peft"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "glm", "hybrid"])
def test_the_bare_model_on_the_cache_answers_as_the_adapted_model(name, layout):
    model, inputs = prefixed(name, layout=layout), batch(name)
    cache = model.prefixes["default"].to_cache(batch_size=2)
    assert cache.get_seq_length() == P
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        found = bare(name)(**served(name), past_key_values=cache).logits
        torch.testing.assert_close(found[real], model(**inputs).logits[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["native", "peft"])
@pytest.mark.parametrize("name", ["llama", "hybrid"])
def test_the_bare_model_generates_the_same_from_the_cache(name, layout):
    model, base = prefixed(name, layout=layout), bare(name)
    expected = model.generate(**batch(name, left=True), max_new_tokens=6, do_sample=False)
    found = base.generate(**served(name, left=True), past_key_values=to_cache(model, batch_size=2), max_new_tokens=6,
                          do_sample=False)  # fmt: skip
    assert torch.equal(found, expected)


def test_learned_positions_start_at_zero_beside_a_native_cache():
    model, inputs = prefixed("gpt2"), batch("gpt2")
    positions = torch.arange(8)[None].expand(2, -1)
    with torch.no_grad():
        expected = model(**inputs).logits
        cache = to_cache(model, batch_size=2)
        found = bare("gpt2")(**served("gpt2"), position_ids=positions, past_key_values=cache).logits
        moved = bare("gpt2")(**served("gpt2"), past_key_values=to_cache(model, batch_size=2)).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    assert (moved[real] - expected[real]).abs().max() > 0.01
    prompt, options = batch("gpt2", left=True), {"max_new_tokens": 6, "do_sample": False}
    positions = (prompt["attention_mask"].cumsum(1) - 1).clamp_min(0)
    cache = to_cache(model, batch_size=2)
    found = bare("gpt2").generate(**served("gpt2", left=True), position_ids=positions, past_key_values=cache, **options)
    assert torch.equal(found, model.generate(**prompt, **options))


def test_learned_positions_start_after_a_cache_in_the_layout_of_peft():
    model, inputs = prefixed("gpt2", layout="peft"), batch("gpt2")
    with torch.no_grad():
        found = bare("gpt2")(**served("gpt2"), past_key_values=to_cache(model, batch_size=2)).logits
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(found[real], model(**inputs).logits[real], atol=1e-5, rtol=1e-5)


def test_a_cache_is_made_beside_other_adapters_and_disturbs_nothing():
    model, inputs = prefixed("llama"), batch("llama")
    model.add_adapter("lora", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False))
    alone = to_cache(model, "default")
    model.train().set_adapter(["default", "lora"])
    before = model.eval()(**inputs).logits
    model.train()
    again = to_cache(model)
    assert all(torch.equal(one.keys, other.keys) for one, other in zip(alone.layers, again.layers))
    assert model.training and torch.equal(model.eval()(**inputs).logits, before)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bert", "no decoder"),
        ("t5", "no decoder"),
        ("mistral", "a window of 6 tokens"),
        ("recurrent", "a window of 64 tokens"),
        ("latent", "a trial run of the bare model on the cache"),
    ],
)
def test_what_a_cache_cannot_say_is_refused(name, reason):
    model, inputs = prefixed(name), batch(name)
    before = model(**inputs).logits
    with pytest.raises(TargetError, match=reason):
        to_cache(model)
    assert torch.equal(model(**inputs).logits, before)


def test_a_prefix_on_some_of_the_layers_is_refused():
    with pytest.raises(TargetError, match="trial run"):
        to_cache(prefixed("llama", sites=["model.layers.1.self_attn"]))


def test_only_prefixes_become_caches():
    model = prefixed("llama")
    with pytest.raises(AdapterNameError, match=r"to_cache: adapter_name='other' names no single prefix"):
        to_cache(model, "other")


@pytest.mark.parametrize(("name", "layout"), [("llama", "native"), ("qwen3", "native"), ("gpt2", "peft")])
def test_a_cache_of_real_text_starts_a_prefix_that_is_the_text(name, layout):
    base = bare(name)
    with torch.no_grad():
        cache = base(input_ids=torch.tensor([TEXT]), use_cache=True).past_key_values
        model = prefixed(name, layout=layout)
        initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
        torch.testing.assert_close(model(input_ids=INPUT).logits, with_text(name), atol=2e-5, rtol=1e-5)
        if name != "gpt2":
            expected = prefixed(name, layout=layout, init_token_ids=TEXT).prefixes["default"].encoder()
            torch.testing.assert_close(model.prefixes["default"].encoder(), expected, atol=1e-5, rtol=1e-5)


def test_a_cache_that_does_not_fit_is_refused_before_anything_changes():
    model = prefixed("llama")
    before = model.prefixes["default"].encoder().clone()
    with torch.no_grad():
        short = bare("llama")(input_ids=torch.tensor([TEXT[:3]]), use_cache=True).past_key_values
        rows = bare("llama")(input_ids=torch.tensor([TEXT, TEXT]), use_cache=True).past_key_values
        wide = bare("qwen3")(input_ids=torch.tensor([TEXT]), use_cache=True).past_key_values
    for cache, kind, reason in (
        (short, DataError, "at least num_virtual_tokens=4 tokens"),
        (rows, DataError, r"expected \(1, heads, tokens, dim\)"),
        ([], DataError, "empty"),
        (wide, MismatchError, "layers of shapes"),
    ):
        with pytest.raises(kind, match=reason):
            initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
        assert torch.equal(model.prefixes["default"].encoder(), before)


# ---------------------------------------------------------------------------------------------------------- composition


def two(name: str, config_class=PrefixTuningConfig, **settings) -> PeftModel:
    torch.manual_seed(2)
    config = config_class(task_type=KINDS[name][1], num_virtual_tokens=P, **settings)
    model = get_peft_model(bare(name), config, adapter_name="a")
    model.add_adapter("b", config_class(task_type=KINDS[name][1], num_virtual_tokens=2, **settings))
    if config_class is PrefixTuningConfig:
        redraw(model)
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("config_class", [PrefixTuningConfig, CartridgeConfig])
def test_a_composition_is_both_of_them_active(name, config_class, tmp_path):
    model, inputs = two(name, config_class), batch(name)
    model.set_adapter(["a", "b"])
    with torch.no_grad():
        expected = model(**inputs).logits
        compose_prefixes(model, ["a", "b"], "both")
        model.set_adapter("both")
        assert torch.equal(model(**inputs).logits, expected)
        model.save_pretrained(tmp_path, selected_adapters=["a", "b"])
        compose_prefix_folders([tmp_path / "a", tmp_path / "b"], output_path=tmp_path / "both")
        loaded = PeftModel.from_pretrained(bare(name), tmp_path / "both")
        assert torch.equal(loaded(**inputs).logits, expected)
    assert loaded.peft_config["default"].num_virtual_tokens == P + 2


def test_projected_prefixes_compose_to_a_plain_one():
    model, inputs = two("llama", prefix_projection=True), batch("llama")
    model.set_adapter(["a", "b"])
    with torch.no_grad():
        expected = model(**inputs).logits
        compose_prefixes(model, ["a", "b"], "both")
        model.set_adapter("both")
        torch.testing.assert_close(model(**inputs).logits, expected)
    assert not model.peft_config["both"].prefix_projection and model.peft_config["a"].prefix_projection


def test_what_cannot_be_composed_is_refused_and_nothing_is_written(tmp_path):
    model = two("llama")
    model.add_adapter("c", CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    model.add_adapter("lora", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    for names, kind, reason in (
        (["a"], ConfigError, "two adapters or more"),
        (["a", "c"], MismatchError, "peft_type"),
        (["a", "lora"], AdapterNameError, "'lora' names no single prefix"),
    ):
        with pytest.raises(kind, match=reason):
            compose_prefixes(model, names, "new")
    assert list(model.peft_config) == ["a", "b", "c", "lora"]
    model.save_pretrained(tmp_path)
    other = prefixed("llama", bare("llama").float())
    with torch.no_grad():
        other.get_base_model().model.embed_tokens.weight.add_(1)
    other.save_pretrained(tmp_path / "other")
    for names, kind, reason in (
        (["a", "other"], MismatchError, "made for different base models"),
        (["a", "lora"], ConfigError, "holds no keys and values, but LoraConfig"),
    ):
        with pytest.raises(kind, match=reason):
            compose_prefix_folders([tmp_path / name for name in names], output_path=tmp_path / "new")
    with pytest.raises(ConfigError, match="no cartridge"):
        compose_cartridge_adapters([tmp_path / "a", tmp_path / "b"], output_path=tmp_path / "new")
    with pytest.raises(ConfigError, match="safe_serialization"):
        compose_cartridge_adapters([tmp_path / "c"], output_path=tmp_path / "new", safe_serialization=False)
    heads = prefixed("bert")
    heads.save_pretrained(tmp_path / "heads")
    with pytest.raises(MismatchError, match="beside its prefix"):
        compose_prefix_folders([tmp_path / "heads", tmp_path / "heads"], output_path=tmp_path / "new")
    assert not (tmp_path / "new").exists()
