"""Cartridges: a prefix whose first rows never move, whatever is switched, frozen, loaded or trained."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file

from deltatune import CartridgeConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from deltatune.errors import ConfigError, MismatchError
from deltatune.prompts.text import initialize_kv_prefix_from_text
from tests.prompts.models import KINDS, bare, batch, prefixed
from tests.prompts.test_text import INPUT, TEXT, Tokenizer, with_text


def cartridge(name: str, **settings) -> PeftModel:
    torch.manual_seed(4)
    config = CartridgeConfig(task_type=KINDS[name][1], **{"num_virtual_tokens": 4, **settings})
    return get_peft_model(bare(name), config).eval()


def trained(model: PeftModel, name: str, steps: int = 3) -> PeftModel:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)  # of all parameters, as careless programs do
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch(name)).logits.square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_a_cartridge_is_the_prefix_of_its_rows(name):
    model, other, inputs = cartridge(name), prefixed(name), batch(name)
    other.prefixes["default"].encoder.fill(model.prompt_encoder["default"].weight)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, other(**inputs).logits)


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_exactly_the_rows_after_the_frozen_ones_train(frozen):
    model = cartridge("llama", num_frozen_tokens=frozen)
    encoder = model.prompt_encoder["default"]
    assert model.get_nb_trainable_parameters()[0] == (4 - frozen) * encoder.weight.shape[1]
    before = encoder.weight.detach().clone()
    model.add_adapter("lora", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.set_adapter("lora")
    model.set_adapter("default")
    model.set_requires_grad("default", True)
    model.requires_grad_(True)
    after = trained(model.train(), "llama").prompt_encoder["default"].weight
    assert torch.equal(after[:frozen], before[:frozen])
    assert (after[frozen:] != before[frozen:]).all()


def test_copies_are_equal_and_keep_their_own_frozen_rows():
    model, inputs = cartridge("llama"), batch("llama")
    expected = model(**inputs).logits
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(**inputs).logits, expected)
        clone.prompt_encoder["default"].frozen_embedding.zero_()
        assert not torch.equal(clone(**inputs).logits, expected)
    assert torch.equal(model(**inputs).logits, expected)


def test_frozen_rows_that_are_filled_anew_are_seen_at_once():
    model, inputs = cartridge("llama", num_frozen_tokens=4), batch("llama")
    with torch.no_grad():
        before = model(**inputs).logits
        model.prefixes["default"].encoder.fill(model.prompt_encoder["default"].weight + 1)
        assert not torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_what_was_saved_comes_back_bit_for_bit(name, tmp_path):
    model, inputs = trained(cartridge(name, num_frozen_tokens=2).train(), name).eval(), batch(name)
    model.save_pretrained(tmp_path)
    own = [key for key in load_file(tmp_path / "adapter_model.safetensors") if not key.startswith("base_model.")]
    assert own == ["prefix_embeddings"]
    loaded = PeftModel.from_pretrained(bare(name), tmp_path, is_trainable=True).eval()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert loaded.prompt_encoder["default"].num_frozen_tokens == 2
    assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_a_cartridge_of_text_is_the_text_itself():
    model = cartridge("llama", init_token_ids=TEXT)
    other = cartridge("llama")
    initialize_kv_prefix_from_text(other, Tokenizer(), text=" ".join(map(str, TEXT)))
    for one in (model, other):
        with torch.no_grad():
            torch.testing.assert_close(one(input_ids=INPUT).logits, with_text("llama"), atol=2e-5, rtol=1e-5)


def test_checkpointing_and_generation_work_as_with_a_prefix():
    model, inputs = cartridge("llama").train(), batch("llama")
    model(**inputs).logits.square().mean().backward()
    expected = model.prompt_encoder["default"].trainable_embedding.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**inputs).logits.square().mean().backward()
    found = model.prompt_encoder["default"].trainable_embedding.grad
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    prompt = {key: value[:, :5] for key, value in inputs.items()}
    options = {"max_new_tokens": 5, "do_sample": False}
    cached, plain = (model.eval().generate(**prompt, **options, use_cache=flag) for flag in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("frozen", [-1, 5, True, 1.5])
def test_a_number_of_frozen_tokens_that_cannot_be_is_refused(frozen):
    with pytest.raises(ConfigError, match="num_frozen_tokens"):
        CartridgeConfig(num_virtual_tokens=4, num_frozen_tokens=frozen)
    assert not vars(CartridgeConfig(num_virtual_tokens=4)).get("unknown_fields")


def test_rows_of_another_shape_are_refused_before_anything_changes():
    encoder = cartridge("llama").prompt_encoder["default"]
    before = encoder.weight.detach().clone()
    with pytest.raises(MismatchError, match=r"shape \(3, 64\), this adapter holds \(4, 64\)"):
        encoder.load_prompt_embeddings(before[:3] + 1)
    assert torch.equal(encoder.weight, before)
    encoder.load_prompt_embeddings(before + 1)
    assert torch.equal(encoder.weight, before + 1)


def test_a_file_does_not_say_how_the_cartridge_started(tmp_path):
    cartridge("llama", init_token_ids=TEXT).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "CARTRIDGE" and saved["num_frozen_tokens"] == 1
    assert not {name for name in saved if name.startswith("init_") or name == "tokenizer_name_or_path"}
    assert isinstance(PrefixTuningConfig.from_pretrained(tmp_path), CartridgeConfig)
