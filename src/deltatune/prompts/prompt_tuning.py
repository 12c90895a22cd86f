"""Prompt tuning: X' = [P; X], P trained rows before the embedded tokens.   https://arxiv.org/abs/2104.08691"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from deltatune import checks
from deltatune.adapter import Method
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError
from deltatune.inputs.encoder import InputEncoder, embedded, repeated
from deltatune.inputs.prompt import Input
from deltatune.prompts.config import PromptLearningConfig, twenty_tokens


class PromptTuningInit(str, Enum):
    """Where the rows start: at embedded text, at embedded tokens drawn from the vocabulary, or at random."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@config
class PromptTuningConfig(PromptLearningConfig):
    """Fields and meaning are PEFT's.

    Attributes:
        prompt_tuning_init: "RANDOM" draws from N(0, 1), "SAMPLE_VOCAB" takes tokens at random, "TEXT" a text.
        prompt_tuning_init_text: The text, repeated or cut to `num_virtual_tokens`; needs `tokenizer_name_or_path`.
        prompt_tuning_init_token_ids: The text as token ids; needs no tokenizer.
        tokenizer_name_or_path: Tokenizer of the text.
        tokenizer_kwargs: Passed to `AutoTokenizer.from_pretrained`.
    """

    unsaved = frozenset({"prompt_tuning_init_token_ids"})
    inits = PromptTuningInit

    prompt_tuning_init: str | Enum = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    prompt_tuning_init_token_ids: list[int] | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict | None = None

    def __post_init__(self) -> None:
        if self.peft_type is None:
            self.peft_type = PeftType.PROMPT_TUNING
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        owner, names = type(self).__name__, [member.value for member in self.inits]
        if self.prompt_tuning_init not in names:
            checks.refuse(owner, "prompt_tuning_init", self.prompt_tuning_init, f"one of {', '.join(names)}")
        self.prompt_tuning_init = self.inits(self.prompt_tuning_init)
        given = self.prompt_tuning_init_text is not None and self.tokenizer_name_or_path is not None
        if (
            self.starts_from_text
            and self.prompt_tuning_init_token_ids is None
            and not given
            and not self.inference_mode
        ):
            missing = "prompt_tuning_init_text" if self.prompt_tuning_init_text is None else "tokenizer_name_or_path"
            raise ConfigError(
                f"{owner}: prompt_tuning_init='TEXT' needs {missing} (or give prompt_tuning_init_token_ids)",
                field=missing,
            )
        if self.prompt_tuning_init_token_ids == []:
            checks.refuse(owner, "prompt_tuning_init_token_ids", [], "at least one token id")
        if self.tokenizer_kwargs and not self.starts_from_text:
            checks.refuse(owner, "tokenizer_kwargs", self.tokenizer_kwargs, "none without prompt_tuning_init='TEXT'")

    @property
    def starts_from_text(self) -> bool:
        return self.prompt_tuning_init == "TEXT"

    def start_ids(self) -> list[int]:
        """The tokens of the text."""
        if self.prompt_tuning_init_token_ids is not None:
            return self.prompt_tuning_init_token_ids
        from transformers import AutoTokenizer

        # A config may come from a stranger's file: no code of theirs is run.
        options = {key: value for key, value in (self.tokenizer_kwargs or {}).items() if key != "trust_remote_code"}
        tokenizer: Any = AutoTokenizer.from_pretrained(self.tokenizer_name_or_path, **options)
        ids = list(tokenizer(self.prompt_tuning_init_text)["input_ids"])
        if not ids:
            checks.refuse(type(self).__name__, "prompt_tuning_init_text", self.prompt_tuning_init_text, "some tokens")
        return ids


class PromptEmbedding(InputEncoder):
    """The trainable part: `embedding` (P, token_dim)."""

    def __init__(self, config: PromptTuningConfig, word_embeddings: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__(config)
        if word_embeddings is None or config.inference_mode:
            return
        vocabulary, count = len(word_embeddings.weight), len(self.embedding.weight)  # type: ignore[attr-defined]
        if config.starts_from_text:
            self.start_at(embedded(word_embeddings, repeated(config.start_ids(), count), vocabulary))
        elif config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
            self.start_at(embedded(word_embeddings, torch.randint(vocabulary, (count,)).tolist(), vocabulary))


METHOD = Method(
    PeftType.PROMPT_TUNING,
    PromptTuningConfig,
    None,
    key_prefix="prompt_",
    graft=Input,
    encoder=PromptEmbedding,
    learning_rate=3e-2,
    train_options=twenty_tokens,
)
