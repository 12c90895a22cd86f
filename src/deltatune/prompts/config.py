"""`PromptLearningConfig`: the fields that all methods with virtual tokens share."""

from __future__ import annotations

from deltatune import checks
from deltatune.config import PeftConfig, config


@config
class PromptLearningConfig(PeftConfig):
    """Fields and meaning are PEFT's; all but the first are filled in from the model when they are left out.

    Attributes:
        num_virtual_tokens: Number of virtual tokens P.
        token_dim: Width of the keys of one layer (key heads * head dim).
        num_transformer_submodules: 2 in encoder-decoders, else 1.
        num_attention_heads: Number of key heads of one layer.
        num_layers: Number of attentions that get a prefix.
        modules_to_save: Modules of the base that are trained and saved beside the prompt, such as a classifier.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    def validate(self) -> None:
        super().validate()
        for name in ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads"):
            if getattr(self, name) is not None:
                checks.positive_int(type(self).__name__, name, getattr(self, name))

    @property
    def is_prompt_learning(self) -> bool:
        return True
