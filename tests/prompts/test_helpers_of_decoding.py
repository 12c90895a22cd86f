"""Decoding with a second, smaller model or with the prompt itself as the guesser, wherever the prefix is."""

from __future__ import annotations

import pytest
import torch

from tests.prompts.models import bare, batch, prefixed

NEW = 6
NAMES = ["gpt2", "llama", "mistral", "gemma2", "t5"]


def decoded(model, name: str, **options) -> list[int]:
    inputs = {key: tensor[:1] for key, tensor in batch(name).items() if "decoder" not in key}
    return model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options)[0, -NEW:].tolist()


@pytest.mark.parametrize("prefix_on", ["target", "assistant", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_an_assistant_changes_no_token(name, prefix_on):
    target = bare(name) if prefix_on == "assistant" else prefixed(name)
    assistant = bare(name) if prefix_on == "target" else prefixed(name, seed=5)
    assert decoded(target, name, assistant_model=assistant) == decoded(target, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_assists_itself_and_its_base_assists_it(name):
    """One set of layers in both parts: what the prefix acts on is the pass, not the layer."""
    model = prefixed(name)
    expected = decoded(model, name)
    assert decoded(model, name, assistant_model=model) == expected
    assert decoded(model, name, assistant_model=model.get_base_model()) == expected


@pytest.mark.parametrize("name", NAMES)
def test_guesses_from_the_prompt_change_no_token(name):
    model = prefixed(name)
    expected = decoded(model, name)
    assert decoded(model, name, prompt_lookup_num_tokens=2) == expected


@pytest.mark.parametrize("name", NAMES)
def test_several_beams_and_several_samples_with_and_without_cache(name):
    model, inputs = prefixed(name), batch(name, left=name != "t5")
    inputs.pop("decoder_input_ids", None)
    for options in ({"num_beams": 3, "num_return_sequences": 2, "do_sample": False}, {"do_sample": True, "top_k": 9}):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(4)
            found.append(model.generate(**inputs, max_new_tokens=NEW, use_cache=use_cache, **options))
        assert torch.equal(*found)
