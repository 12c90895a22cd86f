"""`PrefixEncoder` and its config: the article's equations, PEFT's parameters, refusals."""

from __future__ import annotations

import pytest
import torch

from deltatune import PrefixEncoder, PrefixTuningConfig
from deltatune.errors import ConfigError

SIZES = {"num_virtual_tokens": 5, "token_dim": 8, "num_attention_heads": 2, "num_layers": 3, "encoder_hidden_size": 6}


def test_rows_are_the_embedding_without_projection():
    encoder = PrefixEncoder(PrefixTuningConfig(**SIZES))
    assert encoder.embedding.weight.shape == (5, 3 * 2 * 8)
    assert torch.equal(encoder(), encoder.embedding.weight)
    assert torch.equal(encoder(torch.tensor([[4, 0]])), encoder.embedding.weight[[4, 0]][None])


def test_rows_are_a_tanh_mlp_of_a_smaller_embedding_with_projection():
    encoder = PrefixEncoder(PrefixTuningConfig(prefix_projection=True, **SIZES))
    first, last = encoder.transform[0], encoder.transform[2]
    expected = torch.tanh(encoder.embedding.weight @ first.weight.T + first.bias) @ last.weight.T + last.bias
    assert encoder.embedding.weight.shape == (5, 8) and first.weight.shape == (6, 8)
    torch.testing.assert_close(encoder(), expected)


def test_a_row_holds_keys_then_values_of_each_layer():
    encoder = PrefixEncoder(PrefixTuningConfig(**SIZES))
    for layer, (key, value) in enumerate(encoder.keys_values()):
        for token in range(5):
            row = encoder.embedding.weight[token].view(3, 2, 2, 4)[layer]  # (key or value, heads, dim)
            assert torch.equal(key[:, token], row[0]) and torch.equal(value[:, token], row[1])


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("init", [None, "zero"])
def test_names_shapes_and_start_are_those_of_peft(projection, init):
    peft = pytest.importorskip("peft")
    settings = {**SIZES, "prefix_projection": projection, "init_weights": init}
    torch.manual_seed(1)
    theirs = peft.PrefixEncoder(peft.PrefixTuningConfig(**settings)).state_dict()
    torch.manual_seed(1)
    ours = PrefixEncoder(PrefixTuningConfig(**settings)).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_folding_keeps_the_rows_and_drops_the_mlp():
    encoder = PrefixEncoder(PrefixTuningConfig(prefix_projection=True, **SIZES))
    rows = encoder().detach()
    encoder.fill(rows)
    assert torch.equal(encoder(), rows)
    assert [name for name, _ in encoder.named_parameters()] == ["embedding.weight"]
    assert encoder.embedding.weight.requires_grad


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens"),
        ({"encoder_hidden_size": -1}, "encoder_hidden_size"),
        ({"init_weights": "one"}, "init_weights"),
        ({"layout": "huggingface"}, "layout"),
        ({"sites": "("}, "sites"),
        ({"sites": []}, "sites"),
        ({"sites": "all", "layout": "peft"}, "sites"),
        ({"init_weights": "zero", "init_token_ids": [1]}, "init_weights"),
        ({"prefix_projection": True, "init_token_ids": [1]}, "prefix_projection"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_field(settings, field):
    with pytest.raises(ConfigError) as caught:
        PrefixTuningConfig(**{"num_virtual_tokens": 4, **settings})
    assert caught.value.field == field and "\n" not in str(caught.value)
