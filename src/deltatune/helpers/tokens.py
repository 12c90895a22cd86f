"""Decoder inputs from labels."""

from __future__ import annotations

from torch import Tensor

from deltatune.errors import ConfigError


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """What a decoder reads to predict labels (rows, tokens): the start token, then the labels but the last.

    Labels that the loss passes over (-100) become padding.

    Raises:
        ConfigError: There is no padding token.
    """
    if pad_token_id is None:
        raise ConfigError(
            "shift_tokens_right: pad_token_id=None, expected the model's padding token", field="pad_token_id"
        )
    shifted = input_ids.roll(1, dims=-1)
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == -100, pad_token_id)
