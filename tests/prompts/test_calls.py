"""Ways to call a model with a prefix that a plain forward pass does not show: masks, caches, helpers, compilation."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.prompts.models import bare, batch, prefixed

NEW = 5


def row(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor[:1] for key, tensor in batch(name).items()}


def generate(model, inputs, **options) -> list[int]:
    return model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options)[0, -NEW:].tolist()


@pytest.mark.parametrize("name", ["gpt2", "latent"])
def test_every_way_of_decoding_gives_the_tokens_of_plain_forward_passes(name):
    model, inputs = prefixed(name), row(name)
    ids, expected = inputs["input_ids"], []
    for _ in range(NEW):
        with torch.no_grad():
            expected.append(model(input_ids=ids).logits[0, -1].argmax().item())
        ids = torch.cat([ids, torch.tensor([[expected[-1]]])], dim=1)
    assert generate(model, inputs) == expected
    assert generate(model, inputs, assistant_model=bare(name)) == expected
    assert generate(model, inputs, assistant_model=prefixed(name, seed=5)) == expected
    assert generate(model, inputs, prompt_lookup_num_tokens=2) == expected
    assert generate(model, inputs, prefill_chunk_size=3) == expected
    assert generate(model, inputs, past_key_values=StaticCache(config=model.config, max_cache_len=32)) == expected
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    assert generate(model, {**embedded, "attention_mask": inputs["attention_mask"]}) == expected


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_second_turn_goes_on_from_the_users_cache(name):
    model, cache = prefixed(name), DynamicCache(config=bare(name).config)
    first = model.generate(**row(name), max_new_tokens=3, do_sample=False, past_key_values=cache)
    longer = torch.cat([first, torch.tensor([[7, 8, 9]])], dim=1)
    inputs = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    assert generate(model, inputs, past_key_values=cache) == generate(model, inputs)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_compiled_decoding_step_over_a_static_cache_is_one_graph(name):
    model, ids = prefixed(name), row(name)["input_ids"]
    expected = generate(model, row(name))
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        found = [output.logits[0, -1].argmax().item()]
        for index in range(NEW - 1):
            positions = torch.tensor([[ids.shape[1] + index]])
            token = torch.tensor([found[-1:]])
            output = step(input_ids=token, past_key_values=cache, use_cache=True, position_ids=positions)
            found.append(output.logits[0, -1].argmax().item())
    assert found == expected


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_mask_of_four_dimensions_is_the_padding_mask_written_out(name, kind):
    model, inputs = prefixed(name), batch(name)
    real = inputs["attention_mask"].bool()
    seen = torch.ones(8, 8, dtype=torch.bool).tril() & real[:, None, None]
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        found = model(input_ids=inputs["input_ids"], attention_mask=mask).logits
        torch.testing.assert_close(found[real], model(**inputs).logits[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_row_without_tokens_sees_the_prefix_and_spoils_no_other(name):
    model, inputs = prefixed(name, sites="all"), batch(name)
    emptied = {**inputs, "attention_mask": inputs["attention_mask"] * torch.tensor([[1], [0]])}
    with torch.no_grad():
        found = model(**emptied).logits
        torch.testing.assert_close(found[0], model(**inputs).logits[0], atol=1e-5, rtol=1e-5)
    assert found.isfinite().all()
