"""How llama.cpp keeps a model: what it calls the layers, and in which order it has their rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.errors import ConversionError, LimitError


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp keeps a model.

    Attributes:
        name: Of gguf's `MODEL_ARCH`.
        turned: The rows of q_proj and k_proj are reordered, head by head.
    """

    name: str
    turned: bool = False


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("LLAMA", turned=True),
    "MistralForCausalLM": Architecture("LLAMA", turned=True),
    "SmolLM3ForCausalLM": Architecture("SMOLLM3", turned=True),
    "GraniteForCausalLM": Architecture("GRANITE", turned=True),
    "OlmoForCausalLM": Architecture("OLMO", turned=True),
    "Qwen2ForCausalLM": Architecture("QWEN2"),
    "Qwen3ForCausalLM": Architecture("QWEN3"),
    "GemmaForCausalLM": Architecture("GEMMA"),
    "Gemma2ForCausalLM": Architecture("GEMMA2"),
    "Gemma3ForCausalLM": Architecture("GEMMA3"),
    "Phi3ForCausalLM": Architecture("PHI3"),
    "Starcoder2ForCausalLM": Architecture("STARCODER2"),
    "CohereForCausalLM": Architecture("COMMAND_R"),
    "Olmo2ForCausalLM": Architecture("OLMO2"),
    "GPT2LMHeadModel": Architecture("GPT2"),
    "T5ForConditionalGeneration": Architecture("T5"),
    "MT5ForConditionalGeneration": Architecture("T5"),
    "UMT5ForConditionalGeneration": Architecture("T5"),
}


def architecture(base: Any) -> Architecture:
    """Raises ConversionError where llama.cpp's names and orders are not known to us."""
    name = type(base).__name__
    if name not in ARCHITECTURES:
        raise ConversionError(
            f"{name}: how llama.cpp keeps this architecture is not known here; known are "
            f"{', '.join(ARCHITECTURES)}. `deltatune merge` and llama.cpp's convert_hf_to_gguf.py work for all it has",
            field="to",
            found=name,
        )
    return ARCHITECTURES[name]


def library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise LimitError(
            "GGUF files are written with the package gguf: pip install 'deltatune[gguf]'",
            field="gguf",
            found=None,
            expected="the package gguf",
            hint="pip install 'deltatune[gguf]'",
        ) from error
    return gguf


def names(kind: Architecture, base: Any) -> dict[str, str]:
    """Path of a layer -> the name of its weight in llama.cpp."""
    gguf = library()
    depth = getattr(base.config, "num_hidden_layers", None) or base.config.num_layers
    depth = max(depth, getattr(base.config, "num_decoder_layers", None) or 0)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.name], depth)
    found = {}
    for path, _ in base.named_modules():
        bare = path.replace(".base_layer", "")
        name = table.get_name(f"{bare}.weight", try_suffixes=(".weight",)) if bare else None
        if name is not None:
            found[bare] = name
    return found


def turned(path: str, tensor: Tensor, kind: Architecture, base: Any, back: bool = False) -> Tensor:
    """Rows (head, half, i) -> (head, i, half), or back, of B of queries and keys."""
    leaf = path.rpartition(".")[2]
    if not kind.turned or leaf not in ("q_proj", "k_proj"):
        return tensor
    heads = base.config.num_attention_heads
    if leaf == "k_proj":
        heads = getattr(base.config, "num_key_value_heads", None) or heads
    halves = (len(tensor) // heads // 2, 2) if back else (2, len(tensor) // heads // 2)
    return tensor.reshape(heads, *halves, -1).transpose(1, 2).reshape(tensor.shape)
