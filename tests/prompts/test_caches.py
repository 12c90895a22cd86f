"""Caches of the user's own, over several calls, and a decoding loop that transformers compiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Cache, CompileConfig, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import QuantizedLayer

from tests.prompts.models import bare, batch, prefixed

NEW = 5


class HalfLayer(QuantizedLayer):
    """The least of all quantisations: keys and values of more than two tokens wait in half precision."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor.to(torch.bfloat16)

    def _dequantize(self, q_tensor: Tensor) -> Tensor:
        return q_tensor.float()


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=40),
    "quantised": lambda config: Cache(layers=[HalfLayer(residual_length=2) for _ in range(config.num_hidden_layers)]),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
def test_three_turns_go_on_from_one_cache(name, kind):
    if kind == "quantised" and name in ("mistral", "gemma2"):
        pytest.skip("transformers quantises no windows")
    model, config = prefixed(name), bare(name).config
    cache, ids = CACHES[kind](config), batch(name)["input_ids"][:1]
    for _ in range(3):
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
        found = model.generate(ids, **options, past_key_values=cache)
        assert torch.equal(found, model.generate(ids, **options))
        ids = torch.cat([found, torch.tensor([[7, 8, 9]])], dim=1)
    assert cache.get_seq_length() == ids.shape[1] - 4  # no virtual tokens in it, nor the last token of the turn


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_cache_for_both_halves_goes_on_in_pieces(name):
    model, inputs = prefixed(name, sites="all"), batch(name)
    targets = inputs.pop("decoder_input_ids")
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    with torch.no_grad():
        whole = model(**inputs, decoder_input_ids=targets).logits
        parts = [
            model(**inputs, decoder_input_ids=targets[:, piece], past_key_values=cache, use_cache=True).logits
            for piece in (slice(0, 2), slice(2, 3), slice(3, 6))
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
def test_generation_over_a_static_cache_that_transformers_compiles(name):
    model, inputs = prefixed(name), batch(name, left=True)
    options = {"max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(**inputs, **options)
    compiling = CompileConfig(backend="aot_eager", fullgraph=True, mode=None, dynamic=False)
    compiling._compile_all_devices = True  # as on a GPU
    model.get_base_model().generation_config.compile_config = compiling
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
