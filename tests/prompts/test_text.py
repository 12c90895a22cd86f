"""A prefix of real text: the model with it answers as if the text stood before the input."""

from __future__ import annotations

import pytest
import torch

from deltatune import PrefixTuningConfig
from deltatune.errors import AdapterNameError, ConfigError, DataError, TargetError
from deltatune.prompts.text import initialize_kv_prefix_from_text
from tests.prompts.models import bare, prefixed

TEXT = [9, 33, 12, 40]
INPUT = torch.tensor([[5, 21, 7, 50, 11]])


class Tokenizer:
    chat_template = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def with_text(name: str) -> torch.Tensor:
    with torch.no_grad():
        return bare(name)(input_ids=torch.cat([torch.tensor([TEXT]), INPUT], 1)).logits[:, len(TEXT) :]


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, "native") for name in ("llama", "qwen3", "glm", "latent")]
    + [(name, "peft") for name in ("gpt2", "llama", "glm", "mistral")],
)
def test_a_prefix_of_text_is_the_text_itself(name, layout):
    """Natively where positions are rotary; with PEFT's layout, whose tokens start at P, with learned positions too."""
    model = prefixed(name, init_token_ids=TEXT, layout=layout)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=INPUT).logits, with_text(name), atol=2e-5, rtol=1e-5)


def test_learned_positions_serve_when_the_caller_moves_them():
    model = prefixed("gpt2", init_token_ids=TEXT)
    positions = torch.arange(len(TEXT), len(TEXT) + INPUT.shape[1])[None]
    with torch.no_grad():
        found = model(input_ids=INPUT, position_ids=positions).logits
    torch.testing.assert_close(found, with_text("gpt2"), atol=2e-5, rtol=1e-5)


def test_all_sites_of_an_encoder_decoder_start_from_the_text():
    model = prefixed("t5", init_token_ids=TEXT, sites="all")
    rows = model.prompt_encoder["default"].embedding.weight
    base = model.get_base_model()
    with torch.no_grad(), model.disable_adapter():
        states = base.encoder(torch.tensor([TEXT])).last_hidden_state[0]
    config = model.peft_config["default"]
    column = 0
    for name, (heads, dim, value_heads, value_dim) in zip(config.site_names, config.site_shapes):
        if "EncDec" in name:  # the keys of a cross-attention are plain projections of the encoder's states
            torch.testing.assert_close(rows[:, column : column + heads * dim], base.get_submodule(name).k(states))
        column += heads * dim + value_heads * value_dim


def test_the_public_function_fills_the_active_prefix_and_returns_its_rows():
    model = prefixed("llama", num_virtual_tokens=3)
    rows = initialize_kv_prefix_from_text(model, Tokenizer(), text="9 33 12 40")
    assert torch.equal(rows, model.prompt_encoder["default"].embedding.weight)
    assert torch.equal(rows, prefixed("llama", num_virtual_tokens=3, init_token_ids=TEXT).prefixes["default"].encoder())


def test_start_from_text_is_not_saved(tmp_path):
    model = prefixed("llama", init_token_ids=TEXT)
    model.save_pretrained(tmp_path)
    loaded = PrefixTuningConfig.from_pretrained(tmp_path)
    assert loaded.init_token_ids is None and loaded.num_virtual_tokens == 4


def test_text_that_cannot_serve_is_refused():
    with pytest.raises(DataError, match="2 tokens, the prefix 4 virtual tokens"):
        prefixed("llama", init_token_ids=[5, 6])
    with pytest.raises(DataError, match=r"\[640\] are outside of the vocabulary of LlamaForCausalLM"):
        prefixed("llama", init_token_ids=[5, 6, 640, 7])
    for name in ("gpt2", "bert"):  # learned positions, 64 of them
        with pytest.raises(DataError, match=r"the text has 65 tokens, \w+ has 64 positions"):
            prefixed(name, init_token_ids=[5] * 65)
    with pytest.raises(ConfigError, match="init_text needs tokenizer_name_or_path"):
        prefixed("llama", init_text="hello", init_token_ids=None)
    with pytest.raises(TargetError, match="attends several times in a pass"):
        prefixed("albert", init_token_ids=TEXT)
    model = prefixed("llama", prefix_projection=True)
    with pytest.raises(ConfigError, match="prefix_projection"):
        initialize_kv_prefix_from_text(model, Tokenizer(), text="9 33 12 40")
    with pytest.raises(AdapterNameError, match="'other'"):
        initialize_kv_prefix_from_text(model, Tokenizer(), text="9", adapter_name="other")
    with pytest.raises(ConfigError, match="num_virtual_tokens=9"):
        initialize_kv_prefix_from_text(prefixed("llama"), Tokenizer(), text="9", num_virtual_tokens=9)
