"""How keys and values start: from a trained prefix, and at the size of the model's own."""

from __future__ import annotations

import pytest
import torch

from deltatune import CartridgeConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from deltatune.errors import ConfigError, MismatchError, TargetError
from deltatune.prompts.capture import capture
from tests.prompts.models import KINDS, bare, batch, prefixed


def rows(model: PeftModel, name: str = "default") -> torch.Tensor:
    return model.prefixes[name].encoder().detach()


def settings(name: str = "llama", **given):
    return {"task_type": KINDS[name][1], "num_virtual_tokens": 4, **given}


@pytest.mark.parametrize("config_class", [PrefixTuningConfig, CartridgeConfig])
@pytest.mark.parametrize("source", ["folder", "adapter"])
def test_a_trained_prefix_is_taken_cut_and_continued(source, config_class, tmp_path):
    model = prefixed("llama", prefix_projection=True)
    model.save_pretrained(tmp_path)
    trained = rows(model)
    for length in (4, 3, 1000):
        config = config_class(**settings(num_virtual_tokens=length, init_from=str(tmp_path)))
        if source == "adapter":
            config.init_from = "default"
            model.add_adapter(f"of-{length}", config)
            found = rows(model, f"of-{length}")
        else:
            found = rows(get_peft_model(bare("llama"), config))
        assert torch.equal(found[:4], trained[:length])
        drawn = found[4:]
    torch.testing.assert_close(drawn.mean(0), trained.mean(0), atol=0.15, rtol=0)
    torch.testing.assert_close(drawn.std(0), trained.std(0, correction=0), atol=0.15, rtol=0)


def test_a_start_from_a_prefix_is_a_copy(tmp_path):
    model = prefixed("llama")
    model.add_adapter("copy", PrefixTuningConfig(**settings(init_from="default")))
    assert torch.equal(rows(model, "copy"), rows(model))
    with torch.no_grad():
        model.prompt_encoder["copy"].embedding.weight.add_(1)
    assert not torch.equal(rows(model, "copy"), rows(model))
    model.save_pretrained(tmp_path, selected_adapters=["copy"])
    assert PrefixTuningConfig.from_pretrained(tmp_path / "copy").init_from is None


def test_a_start_that_does_not_fit_is_refused_and_leaves_the_model_alone(tmp_path):
    model = prefixed("t5")
    for given, kind, reason in (
        ({"init_from": "nowhere"}, ConfigError, "neither a folder nor a prefix of this model, which has"),
        ({"init_from": "default", "sites": "encoder"}, MismatchError, "other sites"),
        ({"init_from": "default", "layout": "peft"}, MismatchError, "other layout"),
    ):
        with pytest.raises(kind, match=reason):
            model.add_adapter("other", PrefixTuningConfig(**settings("t5", **given)))
        assert list(model.peft_config) == list(model.prefixes) == ["default"]
    prefixed("qwen3").save_pretrained(tmp_path / "wide")
    with pytest.raises(MismatchError, match="other shapes"):
        prefixed("llama", init_from=str(tmp_path / "wide"))
    lora = get_peft_model(bare("llama"), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ConfigError, match="holds no keys and values, but LoraConfig"):
        prefixed("llama", init_from=str(tmp_path / "lora"))
    for given in ({"init_from": "a"}, {"init_weights": "scaled"}):
        with pytest.raises(ConfigError, match="prefix_projection"):
            PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True, **given)
    with pytest.raises(ConfigError, match="exclude each other"):
        PrefixTuningConfig(num_virtual_tokens=4, init_from="a", init_token_ids=[1, 2, 3, 4])


@pytest.mark.parametrize("config_class", [PrefixTuningConfig, CartridgeConfig])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "latent"])
def test_a_scaled_start_has_the_size_of_real_keys_and_values(name, config_class):
    torch.manual_seed(0)
    config = config_class(**settings(name, num_virtual_tokens=48, init_weights="scaled"))
    prefix = get_peft_model(bare(name), config).prefixes["default"]
    real = capture(prefix.stage.model, prefix.sites, batch(name)["input_ids"][:1])
    for (key, value), (real_key, real_value) in zip(prefix.encoder.keys_values(), real):
        for drawn, expected in ((key, real_key[0]), (value, real_value[0])):
            size = drawn.square().mean((1, 2)).sqrt() / expected.square().mean((1, 2)).sqrt()  # of each head
            assert (size > 0.5).all() and (size < 2).all()


def test_a_scaled_start_needs_a_model_that_reads_text():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))
    with pytest.raises(TargetError, match="which it does not read"):
        get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=2, init_weights="scaled"))
