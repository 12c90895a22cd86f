"""Generation: a prefix is in no cache, so every kind of cache, and none, gives the same tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests.prompts.models import bare, batch, prefixed

NEW = 6


def prompt(name: str) -> dict[str, torch.Tensor]:
    inputs = batch(name, left=name not in ("t5", "bart"))
    return {key: inputs[key] for key in ("input_ids", "attention_mask")}


def generate(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options)[:, -NEW:].tolist()


def first_scores(model, inputs) -> torch.Tensor:
    options = {"output_scores": True, "return_dict_in_generate": True, "do_sample": False}
    return model.generate(**inputs, max_new_tokens=1, **options).scores[0]


@pytest.mark.parametrize("layout", ["native", "peft"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "t5"])
def test_caches_agree_with_plain_forward_passes(name, attention, layout):
    model = prefixed(name, bare(name, attention), layout=layout)
    inputs = prompt(name)
    expected = generate(model, inputs)
    scores = first_scores(model, inputs)
    with model.disable_adapter():
        assert (first_scores(model, inputs) - scores).abs().max() > 0.05
    if not (name == "mistral" and layout == "peft"):  # PEFT's window counts padding, which only a cache holds
        assert generate(model, inputs, use_cache=False) == expected
    caches = ["static"] if name != "t5" else []
    for cache in caches:
        assert generate(model, inputs, cache_implementation=cache) == expected
    if name == "t5" or layout == "peft":
        return
    for row, padding in ((0, 0), (1, 3)):  # one token at a time, over the row without its padding
        ids = inputs["input_ids"][row : row + 1, padding:]
        for token in expected[row]:
            assert model(input_ids=ids).logits[0, -1].argmax().item() == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_beams_agree_with_and_without_cache(name):
    model, inputs = prefixed(name, sites="all"), prompt(name)
    assert generate(model, inputs, num_beams=3) == generate(model, inputs, num_beams=3, use_cache=False)


def test_sampling_draws_the_same_with_and_without_cache():
    model, inputs = prefixed("llama"), prompt("llama")
    found = []
    for use_cache in (True, False):
        torch.manual_seed(4)
        found.append(model.generate(**inputs, max_new_tokens=NEW, do_sample=True, use_cache=use_cache))
    assert torch.equal(*found)


def test_a_cache_of_the_users_own_and_prompt_lookup_agree():
    model = prefixed("llama")
    inputs = {name: tensor[:1] for name, tensor in prompt("llama").items()}
    expected = generate(model, inputs)
    cache = DynamicCache()
    assert generate(model, inputs, past_key_values=cache) == expected
    assert cache.get_seq_length() == 8 + NEW - 1  # no virtual tokens in it
    assert generate(model, inputs, prompt_lookup_num_tokens=2) == expected


def test_decoding_by_hand_with_the_returned_cache_agrees():
    model, ids = prefixed("gpt2"), batch("gpt2")["input_ids"][:1]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :5], use_cache=True)
        second = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_packed_sequences_do_not_see_each_other(name):
    """position_ids that restart, and no mask: transformers then isolates the sequences, with a prefix too."""
    model = prefixed(name)
    one, two = torch.randint(3, 64, (1, 5)), torch.randint(3, 64, (1, 4))
    positions = torch.tensor([[*range(5), *range(4)]])
    with torch.no_grad():
        packed = model(input_ids=torch.cat([one, two], 1), position_ids=positions, use_cache=False).logits
        apart = torch.cat([model(input_ids=one).logits, model(input_ids=two).logits], 1)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "bert", "roberta", "t5", "bart"])
def test_padding_does_not_change_real_tokens(name, mode):
    model = getattr(prefixed(name, sites="all"), mode)()
    inputs = batch(name)
    alone = {key: tensor[1:] if key == "decoder_input_ids" else tensor[1:, :5] for key, tensor in inputs.items()}
    with torch.no_grad():
        together, single = model(**inputs).logits[1:], model(**alone).logits
    if "decoder_input_ids" not in inputs and name not in ("bert", "roberta"):
        together = together[:, :5]
    torch.testing.assert_close(together, single, atol=1e-5, rtol=1e-5)
