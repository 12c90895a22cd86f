"""The text oracle: a prefix that holds the keys and values of a text is the text, on every decoder.

The reference is the bare model, run on text and input together. Three words of text and five of input stay within
every sliding window and chunk of the models, so that nothing but the prefix stands for the text.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from torch import nn

from deltatune import PrefixTuningConfig, get_peft_model
from deltatune.errors import TargetError
from tests.prompts.models import KINDS, LATENT, LLAMA, TOKENS, bare

TEXT = [9, 33, 12]
INPUT = torch.tensor([[5, 21, 7, 50, 11]])
TOGETHER = torch.cat([torch.tensor([TEXT]), INPUT], dim=1)

# Models whose text is more than one key and value per token and site, as the base model computes it.
EXEMPT = {
    "diffllama": "attends twice per layer, over the same keys with different values",
    "doge": "adds a bias to its keys that depends on their content",
    "modernbert-decoder": "its window in fact drops the text",
}


def _list() -> Path:
    shared = Path(os.environ.get("DELTATUNE_SHARED") or Path(__file__).parents[2] / "shared")
    return shared / "conformance" / "architectures.py"


@cache
def _architectures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("conformance_architectures", _list())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _decoders() -> list[str]:
    """Decoders that compute attention in transformers' interface, and in nothing but attention."""
    if not _list().is_file():
        return []
    found = _architectures().ARCHITECTURES.values()
    return [a.name for a in found if a.family == "decoder" and a.attention == "interface" and a.name not in EXEMPT]


def _with_prefix(model: nn.Module, layout: str) -> nn.Module:
    config = PrefixTuningConfig(num_virtual_tokens=3, init_token_ids=TEXT, layout=layout)  # type: ignore[arg-type]
    return get_peft_model(model, config).eval()


def _moves_by_itself(model: transformers.PreTrainedModel) -> bool:
    """Whether text can stand before position 0: not where positions are rows of a table."""
    tables = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    return not any("pos" in name or "wpe" in name for name in tables)


def _assert_oracle(build) -> None:
    with torch.no_grad():
        bare = build()
        expected = bare(input_ids=TOGETHER).logits[:, len(TEXT) :]
        assert (bare(input_ids=INPUT).logits - expected).abs().max() > 0.1, "the text has no effect on this model"
        tolerance = 1e-5 * max(1.0, expected.abs().max().item())
        native = _with_prefix(build(), "native")
        moved = {} if _moves_by_itself(bare) else {"position_ids": torch.arange(3, 8)[None]}
        torch.testing.assert_close(native(input_ids=INPUT, **moved).logits, expected, atol=tolerance, rtol=1e-5)
        try:
            shifted = _with_prefix(build(), "peft")
        except TargetError:  # where PEFT's numbers mean nothing
            return
        torch.testing.assert_close(shifted(input_ids=INPUT).logits, expected, atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("attention", [None, pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", _decoders() or [pytest.param("", marks=pytest.mark.skip("the list is not here"))])
def test_a_prefix_of_text_is_the_text_on_every_decoder_of_the_list(name, attention):
    architectures = _architectures()
    _assert_oracle(lambda: architectures.build(architectures.ARCHITECTURES[name], attention))


_ROPE = {
    "default": {},
    "partial": {"partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}  # fmt: skip
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "head_dim": 8}
_SMALL = {
    **{f"rope-{name}": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **rope}})
       for name, rope in _ROPE.items()},
    "interleaved": ("cohere", {}),
    "rope in some layers": ("cohere2", _WINDOWS),
    "rope of each kind of layer": ("gemma3_text", {**_WINDOWS, "query_pre_attn_scalar": 8}),
    "sinks": ("gpt_oss", {**_WINDOWS, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "chunks": (
        "llama4_text",
        {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1,
         "attention_chunk_size": 8, "layer_types": ["chunked_attention", "full_attention"], "moe_layers": []},
    ),
    "latent": ("deepseek_v3", {**LATENT, "v_head_dim": 12}),
}  # fmt: skip


@pytest.mark.parametrize("kind", _SMALL)
def test_a_prefix_of_text_is_the_text_whatever_the_positions_are(kind, monkeypatch):
    model_type, settings = _SMALL[kind]
    monkeypatch.setitem(KINDS, "small", ("AutoModelForCausalLM", "CAUSAL_LM", model_type, {**LLAMA, **settings}))
    _assert_oracle(lambda: bare("small"))


def test_positions_that_no_hook_moves_are_no_place_for_the_layout_of_peft(monkeypatch, tmp_path):
    """CTRL adds rows of a tensor that is no module's: PEFT's numbers would silently be read at the wrong positions."""
    settings = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "n_positions": 64}
    monkeypatch.setitem(KINDS, "small", ("AutoModelForCausalLM", "CAUSAL_LM", "ctrl", settings))
    with pytest.raises(TargetError, match="enter where they cannot be moved"):
        _with_prefix(bare("small"), "peft")
    with pytest.raises(TargetError, match="enter where they cannot be moved"):
        _with_prefix(bare("small"), "native").save_pretrained(tmp_path, format="peft")


@pytest.mark.parametrize("name", ["llama", "mistral", "latent", "gpt2"])
def test_text_continues_as_if_it_had_been_read(name):
    """Greedy tokens, through a cache: the base after text and input, against the prefix after the input alone."""
    options = {"max_new_tokens": 2 if name == "mistral" else 6, "do_sample": False}  # before a window drops text
    ids = TOGETHER[:, :5] if name == "mistral" else TOGETHER
    expected = bare(name).generate(ids, attention_mask=torch.ones_like(ids), **options)[:, len(TEXT) :]
    layout = "native" if _moves_by_itself(bare(name)) else "peft"
    model, ids = _with_prefix(bare(name), layout), ids[:, len(TEXT) :]
    assert model.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist() == expected.tolist()


def test_a_batch_of_rows_of_different_length_sees_the_text_before_each():
    model, rows = _with_prefix(bare("llama"), "native"), [[5, 21, 7, 50, 11], [40, 8]]
    ids = torch.tensor([row + [0] * (5 - len(row)) for row in rows])
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=(ids > 0).long()).logits
        for row, logits in zip(rows, found):
            expected = bare("llama")(input_ids=torch.tensor([TEXT + row])).logits[0, len(TEXT) :]
            torch.testing.assert_close(logits[: len(row)], expected, atol=1e-5, rtol=1e-5)


def test_the_gradient_of_a_key_of_text_is_that_of_the_key_in_the_text():
    """dL/dK of the first layer through the prefix = dL/dK through the text, whose keys are a plain projection."""
    model = _with_prefix(bare("gpt2"), "peft").train()
    model(input_ids=INPUT).logits.square().sum().backward()
    found = model.prompt_encoder["default"].embedding.weight.grad[:, -64:]  # keys and values of the last layer

    base = bare("gpt2").train()
    kept = []

    def keep(module, args, output):
        output.retain_grad()
        kept.append(output)

    base.transformer.h[1].attn.c_attn.register_forward_hook(keep)
    base(input_ids=TOGETHER).logits[:, len(TEXT) :].square().sum().backward()
    torch.testing.assert_close(found, kept[0].grad[0, : len(TEXT), 32:], atol=1e-4, rtol=1e-4)
