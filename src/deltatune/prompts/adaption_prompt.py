"""LLaMA-Adapter: A' = A + g softmax(Q k(P)^T / sqrt(d)) v(P), g = 0 at first.   https://arxiv.org/abs/2303.16199

A is what an attention module has computed for its queries Q. Beside it, the same queries look at a learned prompt P,
which the module's own projections k and v make into keys and values, with a softmax of its own. The gate g, one number
per module, starts at zero: a fresh adapter changes nothing, and lets its prompt in as it trains.

How it works, from top to bottom:

1. `AdaptionPromptConfig` says how long a prompt is, and how many of the last attention modules get one.
2. `AdaptionPromptEncoder` holds what is trained: for each of them P (1, adapter_len, width) and g (1).
3. `deltatune.prompts.projections` finds which children of the module are k and v.
4. When the module has called its attention function, `deltatune.prompts.gates` adds the gated part to the result,
   before the module's output projection.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Method
from deltatune.config import PeftConfig, PeftType, config
from deltatune.errors import ConfigError
from deltatune.prompts import config as prompts
from deltatune.prompts.gates import Gates


@config
class AdaptionPromptConfig(PeftConfig):
    """What a user sets.

    Attributes:
        target_modules: Ending of the paths of the attention modules; all self-attentions when left out.
        adapter_len: Number of tokens of each prompt; the paper has 10.
        adapter_layers: How many of these modules get a prompt, counted from the last; all when left out.
        layout: "native": the gated part passes through the module's output projection, as in the paper. "peft": PEFT's
            numbers; see `deltatune.prompts.gates`. Files without our marker are read so. None: "native", and under
            `deltatune.as_peft` "peft".
        init_text: Start from what the projections read for this text; needs `tokenizer_name_or_path`.
        init_token_ids: The same, as token ids.
        tokenizer_name_or_path: Tokenizer for `init_text`.
        modules_to_save: Modules of the base that are trained and saved beside the prompts, such as a classifier.
    """

    unsaved: ClassVar[frozenset[str]] = frozenset({"init_text", "init_token_ids", "tokenizer_name_or_path"})
    file_defaults: ClassVar[dict[str, Any]] = {"layout": "peft"}

    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None
    layout: prompts.Layout | None = None
    init_text: str | None = None
    init_token_ids: list[int] | None = None
    tokenizer_name_or_path: str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        if self.peft_type is None:
            self.peft_type = PeftType.ADAPTION_PROMPT
        self.layout = self.layout or prompts.usual_layout
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        for name in ("adapter_len", "adapter_layers"):
            if getattr(self, name) is not None:
                checks.positive_int(type(self).__name__, name, getattr(self, name))
        if self.init_text is not None and self.init_token_ids is not None:
            raise ConfigError(
                f"{type(self).__name__}: init_text and init_token_ids exclude each other; keep one", field="init_text"
            )

    @property
    def is_adaption_prompt(self) -> bool:
        return True

    @property
    def length(self) -> int:
        """The number of tokens of a prompt, which must be given."""
        if self.adapter_len is None:
            raise ConfigError(
                f"{type(self).__name__}: adapter_len is not set; 10 is a usual start", field="adapter_len"
            )
        return self.adapter_len


class AdaptionPrompt(nn.Module):
    """What one attention module gets: the prompt (1, adapter_len, width), and the gate (1)."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.adaption_prompt = nn.Parameter(torch.randn(1, length, width))
        self.adaption_gate = nn.Parameter(torch.zeros(1))


class AdaptionPromptEncoder(nn.ModuleList):
    """One `AdaptionPrompt` per attention module, in the order of the sites."""

    def __init__(self, config: AdaptionPromptConfig, widths: list[int]) -> None:
        super().__init__(AdaptionPrompt(config.length, width) for width in widths)

    @torch.no_grad()
    def fill(self, prompts: list[Tensor]) -> None:
        """Take one prompt (adapter_len, width) per module."""
        for layer, prompt in zip(self, prompts, strict=True):
            layer.adaption_prompt.copy_(prompt[None])  # type: ignore[operator]


METHOD = Method(
    PeftType.ADAPTION_PROMPT,
    AdaptionPromptConfig,
    None,
    key_prefix="adaption_",
    graft=Gates,
    encoder=AdaptionPromptEncoder,
    learning_rate=9e-3,
    train_options=lambda given: {"adapter_len": 10},
)
