"""Small inputs for a trial forward pass of a model that is known only by its class and config."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SOURCE, TARGET = 4, 3  # tokens in the encoder and in the decoder: different, so that cross-attention shows
LONGER = 16  # for models that pool their tokens, layer by layer


def example_inputs(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Inputs to try in turn, the simplest first."""
    accepted = inspect.signature(model.forward).parameters
    config = model.config
    main = getattr(model, "main_input_name", "input_ids")
    fixed: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    seq2seq = getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted
    if seq2seq:
        fixed["decoder_input_ids"] = _tokens(model, TARGET)
    makers = {"input_ids": _texts, "pixel_values": _images, "input_features": _features, "input_values": _waves}
    for tensor in makers.get(main, _texts)(model):
        yield {main: tensor, **fixed}
    for tensor in makers.get(main, _texts)(model):  # models of several modalities want them together
        others = {name: next(make(model)) for name, make in makers.items() if name in accepted and name != main}
        if others:
            yield {main: tensor, **others, **fixed}
    if seq2seq:  # classifiers read both sides at the same place
        for tensor in makers.get(main, _texts)(model):
            yield {main: tensor, **fixed, "decoder_input_ids": _tokens(model, SOURCE)}
    elif main == "input_ids":
        yield {main: _tokens(model, LONGER), **fixed}


def two_rows(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs and, as a second row, others of the same length."""
    return {name: _doubled(value) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _doubled(row: Tensor) -> Tensor:
    if row.is_floating_point():
        return torch.cat([row, row + torch.linspace(-1, 1, row.numel()).reshape(row.shape).to(row)])
    return torch.cat([row, row[:, [1, 0, *range(2, row.shape[1])]] if row.ndim > 1 and row.shape[1] > 1 else row])


def call_with_tokens(model: PreTrainedModel, token_ids: Tensor, **more: Any) -> Any:
    """Run a text model on tokens; an encoder-decoder reads them on both sides."""
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids), **more}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = token_ids
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return model(**{name: value for name, value in inputs.items() if name in accepted})


def token_embedding(model: PreTrainedModel) -> Any:
    """The input embedding; None of a model that has none, or says that it has several."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:  # how transformers says that images and sound are no tokens
        return None


def ordinary_tokens(model: PreTrainedModel, length: int) -> Tensor:
    """Different ordinary tokens (1, length) of a text model."""
    return _tokens(model, length)


def _tokens(model: PreTrainedModel, length: int) -> Tensor:
    """Ordinary tokens, ended as a sentence ends: some classifiers read their answer off the end token."""
    config = model.config.get_text_config()
    special = {value for name, value in vars(config).items() if name.endswith("token_id") and isinstance(value, int)}
    ordinary = [token for token in range(length + len(special)) if token not in special][:length]
    end = getattr(config, "eos_token_id", None)
    size = getattr(config, "vocab_size", 0)  # 0: characters, of which there is no table
    ordinary[-1] = end if isinstance(end, int) and 0 <= end < size else ordinary[-1]
    return torch.tensor([ordinary], device=model.device)


def _texts(model: PreTrainedModel) -> Iterator[Tensor]:
    yield _tokens(model, SOURCE)


def _images(model: PreTrainedModel) -> Iterator[Tensor]:
    config = next(
        (part for name in ("vision_config", "encoder") if (part := getattr(model.config, name, None)) is not None),
        model.config,
    )
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    yield _zeros(model, 1, getattr(config, "num_channels", 3), height, width)


def _features(model: PreTrainedModel) -> Iterator[Tensor]:
    config = model.config
    bands = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", None) or 80
    frames = getattr(config, "max_source_positions", None)
    if frames is not None:
        yield _zeros(model, 1, bands, 2 * frames)  # Whisper: exactly this long, halved by its convolutions
    yield _zeros(model, 1, 64, bands)


def _waves(model: PreTrainedModel) -> Iterator[Tensor]:
    config = model.config
    yield _zeros(model, 1, 4000)
    yield _zeros(model, 1, getattr(config, "max_length", 1024), getattr(config, "num_mel_bins", 128))


def _zeros(model: PreTrainedModel, *shape: int) -> Tensor:
    return torch.zeros(shape, device=model.device, dtype=model.dtype)
