"""Tiny random models that see and hear, with a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.prompts.models import LLAMA

IMAGE = 60  # stands for a part of an image
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SIZE, "intermediate_size": 48, "image_size": 16, "patch_size": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEXT = {
    **SIZE, "intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 32, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SPEECH = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
WHISPER = {
    **SPEECH, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 48, "suppress_tokens": None,
    "begin_suppress_tokens": None,
}  # fmt: skip
HEARING = {
    **SIZE, "intermediate_size": 48, "vocab_size": 32, "conv_dim": (16, 16), "conv_kernel": (8, 4),
    "conv_stride": (4, 4), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "hidden_dropout": 0.0, "layerdrop": 0.0,
}  # fmt: skip
DECODER = {**LLAMA, "model_type": "llama"}

Made = tuple[Any, dict[str, Any], str | None]  # model, batch, task type


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(rows: int = 3, length: int = 6) -> Tensor:
    ids = torch.randint(3, IMAGE, (rows, length), generator=torch.Generator().manual_seed(2))
    ids[:, -1] = 2
    return ids


def images() -> Tensor:
    return random(3, 3, 16, 16)


CLASSES = torch.tensor([0, 1, 2])


def vit() -> Made:
    config = transformers.ViTConfig(**VISION, **NO_DROPOUT, num_labels=3)
    return transformers.ViTForImageClassification(config), {"pixel_values": images(), "labels": CLASSES}, None


def dinov2() -> Made:
    config = transformers.Dinov2Config(**SIZE, mlp_ratio=2, image_size=16, patch_size=4, num_labels=3)
    return transformers.Dinov2ForImageClassification(config), {"pixel_values": images(), "labels": CLASSES}, None


def clip() -> Made:
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
    inputs = {"pixel_values": images(), "input_ids": tokens(), "return_loss": True}
    return transformers.CLIPModel(config), inputs, None


def clip_classifier() -> Made:
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16, num_labels=3)
    return transformers.CLIPForImageClassification(config), {"pixel_values": images(), "labels": CLASSES}, None


def whisper() -> Made:
    model: Any = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER))
    return model, {"input_features": random(3, 16, 40), "labels": tokens()}, "SEQ_2_SEQ_LM"


def whisper_classifier() -> Made:
    model: Any = transformers.WhisperForAudioClassification(transformers.WhisperConfig(**WHISPER, num_labels=3))
    return model, {"input_features": random(3, 16, 40), "labels": CLASSES}, None


def speech_to_text() -> Made:
    config = transformers.Speech2TextConfig(
        **SPEECH, input_feat_per_channel=16, max_source_positions=40, max_target_positions=48, conv_channels=16,
        num_conv_layers=2,
    )  # fmt: skip
    inputs = {"input_features": random(3, 40, 16), "labels": tokens()}
    return transformers.Speech2TextForConditionalGeneration(config), inputs, "SEQ_2_SEQ_LM"


def wav2vec2() -> Made:
    model: Any = transformers.Wav2Vec2ForSequenceClassification(transformers.Wav2Vec2Config(**HEARING, num_labels=3))
    return model, {"input_values": random(3, 400), "labels": CLASSES}, None


def _told(parts: int, *around: int) -> dict[str, Tensor]:
    """Tokens behind `parts` of an image, which may stand between two of its own."""
    image = torch.full((3, parts), IMAGE)
    if around:
        image = torch.cat([torch.full((3, 1), around[0]), image, torch.full((3, 1), around[1])], dim=1)
    ids = torch.cat([image, tokens()], dim=1)
    labels = ids.masked_fill(ids >= IMAGE, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def llava() -> Made:
    config = transformers.LlavaConfig(
        text_config=DECODER, vision_config={"model_type": "clip_vision_model", **VISION}, image_token_index=IMAGE,
        vision_feature_layer=-1,
    )  # fmt: skip
    inputs = {"pixel_values": images(), **_told(16)}
    return transformers.LlavaForConditionalGeneration(config), inputs, "CAUSAL_LM"


def idefics3() -> Made:
    config = transformers.Idefics3Config(
        text_config=DECODER, vision_config=VISION, image_token_id=IMAGE, scale_factor=2
    )
    inputs = {"pixel_values": images()[:, None], **_told(4)}
    return transformers.Idefics3ForConditionalGeneration(config), inputs, "CAUSAL_LM"


def qwen2_vl() -> Made:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    config = transformers.Qwen2VLConfig(
        text_config={**LLAMA, "rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE,
        vision_start_token_id=61, vision_end_token_id=62, video_token_id=63,
    )  # fmt: skip
    told = _told(4, 61, 62)
    inputs = {
        "pixel_values": random(3 * 16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]] * 3),
        "mm_token_type_ids": (told["input_ids"] == IMAGE).long(), **told,
    }  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config), inputs, "CAUSAL_LM"


SEEING: dict[str, Callable[[], Made]] = {
    "vit": vit, "dinov2": dinov2, "clip": clip, "clip-classifier": clip_classifier, "whisper": whisper,
    "whisper-classifier": whisper_classifier, "speech2text": speech_to_text, "wav2vec2": wav2vec2,
}  # fmt: skip
TELLING: dict[str, Callable[[], Made]] = {"llava": llava, "idefics3": idefics3, "qwen2-vl": qwen2_vl}


def made(name: str) -> Made:
    """A model with weights at a scale where attention matters; the same at each call."""
    torch.manual_seed(0)
    model, inputs, task = {**SEEING, **TELLING}[name]()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.ndim == 2 and "position" not in path:
                weight.copy_(random(*weight.shape, seed=weight.numel()) / weight.shape[-1] ** 0.5)
    if model.can_generate():
        model.generation_config.eos_token_id = None
    return model.eval(), inputs, task
