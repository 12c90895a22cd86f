"""Start a prefix from real text: the keys and values that the base model itself computes for it.

Where positions are rotary, the text is placed right before the first token, at -P to -1, so that the model with the
prefix answers exactly as if the text stood there. Learned positions cannot be negative: there the text keeps positions
0 to P-1, which in the native layout are also those of the first tokens (in PEFT's layout the tokens start at P).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltatune.errors import ConfigError, DataError, TargetError
from deltatune.prompts.capture import capture, rows_of
from deltatune.prompts.example import token_embedding
from deltatune.prompts.positions import learned_tables
from deltatune.prompts.sites import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deltatune.prompts.config import KeyValueConfig


def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Overwrite a prefix of a PeftModel with the keys and values of `text`; return its rows (P, width).

    Args:
        adapter_name: The prefix to fill; the active one when left out.
        num_virtual_tokens: Must be the number of virtual tokens of that prefix.
        use_chat_template: Put the text into a system message where the tokenizer has a chat template.
        max_length: Cut the text to this many tokens.
    """
    from deltatune.prompts.starts import fillable

    prefix = fillable(model, adapter_name, num_virtual_tokens, "initialize_kv_prefix_from_text")
    ids = token_ids(tokenizer, text, use_chat_template)[:max_length]
    with torch.no_grad():
        rows = text_rows(prefix.stage.model, prefix.config, prefix.sites, ids)
        prefix.encoder.fill(rows)
    return rows


def token_ids(tokenizer: Any, text: str, use_chat_template: bool = False) -> list[int]:
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        message = [{"role": "system", "content": text}]
        return list(tokenizer.apply_chat_template(message, tokenize=True, return_dict=False))
    return list(tokenizer(text)["input_ids"])


def rows_of_config(model: PreTrainedModel, config: KeyValueConfig, sites: list[Site]) -> Tensor:
    """Rows of a prefix that is to start as `init_text` or `init_token_ids`."""
    return text_rows(model, config, sites, ids_of_config(model, config, "num_virtual_tokens"))


def ids_of_config(model: PreTrainedModel, config: Any, field: str) -> list[int]:
    """Tokens of `init_text` or `init_token_ids`, of which there must be `config.length`, the field `field`."""
    ids = config.init_token_ids
    if ids is None:
        if config.tokenizer_name_or_path is None:
            raise ConfigError(
                f"{type(config).__name__}: init_text needs tokenizer_name_or_path (or give init_token_ids)",
                field="tokenizer_name_or_path",
            )
        from transformers import AutoTokenizer

        ids = token_ids(AutoTokenizer.from_pretrained(config.tokenizer_name_or_path), config.init_text or "")
    _check_ids(model, ids, config.length, field)
    return ids


def _check_ids(model: PreTrainedModel, ids: list[int], count: int, field: str) -> None:
    if len(ids) < count:
        raise DataError(
            f"the text has {len(ids)} tokens, the prefix {count} virtual tokens; give a longer text or set "
            f"{field}={len(ids)}",
            field=field,
            found=len(ids),
            expected=count,
        )
    embedding = token_embedding(model)
    if embedding is None:
        raise TargetError(
            f"{type(model).__name__} has no embedding of tokens, which a start from text needs; leave the text out",
            found=type(model).__name__,
        )
    size = len(embedding.weight)
    outside = [token for token in ids if not 0 <= token < size]
    if outside:
        raise DataError(
            f"token ids {outside[:3]} are outside of the vocabulary of {type(model).__name__}, which has {size} tokens",
            found=outside,
        )


def _check_room(model: PreTrainedModel, sites: list[Site], length: int) -> None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and length > longest and learned_tables(model, [site.name for site in sites]):
        raise DataError(
            f"the text has {length} tokens, {type(model).__name__} has {longest} positions; shorten the text",
            field="init_text",
            found=length,
            expected=longest,
        )


def text_rows(model: PreTrainedModel, config: KeyValueConfig, sites: list[Site], ids: list[int]) -> Tensor:
    """Rows (P, width) from the first P of the tokens `ids`."""
    count = config.length
    _check_ids(model, ids, count, "num_virtual_tokens")
    again = [site.name for site in sites if site.calls > 1]
    if again:
        raise TargetError(
            f"{type(model).__name__}: {again[0]!r} attends several times in a pass, each time with other keys and "
            "values; a prefix that they share cannot start from text",
            field="init_text",
            found=again,
        )
    _check_room(model, sites, len(ids))
    first = -count if config.layout == "native" else 0
    pairs = capture(model, sites, torch.tensor([ids], device=model.device), first)
    return rows_of(pairs, count)
