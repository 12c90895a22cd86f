"""Prefix tuning: K' = [P_K; K], V' = [P_V; V] in every attention.   https://arxiv.org/abs/2101.00190

How it works, from top to bottom:

1. `PrefixTuningConfig` says how many virtual tokens P a prefix has, and which attentions (the *sites*) get one.
2. `PrefixEncoder` holds what is trained. It returns one row per virtual token, and a row is the keys and values of all
   sites side by side:

       row = [K of site 0 | V of site 0 | K of site 1 | V of site 1 | ...]        K of a site: heads * head dim

3. At the start of a forward pass the rows are cut into one key and one value tensor per site, once
   (`KeyValueEncoder.keys_values`).
4. When a site calls its attention function, its keys and values are put before those of the real tokens
   (`deltatune.prompts.attention`). Every query sees them; no position is used up, no cache and no mask is touched.
5. Gradients flow back through the attention into the rows. The base model is frozen: only the encoder is trained.

With `prefix_projection` the rows come out of a small MLP, which trains more steadily (section 4.3 of the paper). It is
needed for training only: its output, the *folded* prefix, is all that inference uses.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Method
from deltatune.config import PeftType, TaskType, config
from deltatune.errors import ConfigError
from deltatune.prompts.config import KeyValueConfig, twenty_tokens
from deltatune.prompts.encoder import KeyValueEncoder
from deltatune.prompts.key_values import Prefix


@config
class PrefixTuningConfig(KeyValueConfig):
    """What a user sets, beside where the prefix goes and how it starts (`KeyValueConfig`).

    Attributes:
        encoder_hidden_size: Width of the MLP with `prefix_projection`; the width of one layer's keys when left out.
        prefix_projection: Whether the prefix comes out of a two-layer MLP.
        init_weights: None draws the prefix at random, as PEFT; "zero" starts with keys and values of zero; "scaled"
            draws them of the size that the model's own have.
    """

    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    init_weights: Literal["zero", "scaled"] | None = None

    def __post_init__(self) -> None:
        if self.peft_type is None:
            self.peft_type = PeftType.PREFIX_TUNING
        super().__post_init__()

    @classmethod
    def p_tuning_v2(cls, task_type: str | TaskType | None = None, **options: Any) -> PrefixTuningConfig:
        """A prefix as P-tuning v2 has it (https://arxiv.org/abs/2110.07602): deep prompts for understanding tasks.

        Every attention of the model gets P tokens of its own, trained without a network in between, and the usual
        linear head reads the answer (the task class trains and saves it); the base stays frozen. Sentences need few
        tokens, a label at every token or a span as answer need many (section 3.3): P is 20 and 100.

        Args:
            task_type: One of the six tasks; also says how long the prefix is.
            options: Fields of the config, to have something else.
        """
        return cls(**{"task_type": task_type, **p_tuning_v2_options(task_type), **options})

    def validate(self) -> None:
        super().validate()
        if self.encoder_hidden_size is not None:
            checks.positive_int(type(self).__name__, "encoder_hidden_size", self.encoder_hidden_size)
        start = next((name for name in self.starts if getattr(self, name) not in (None, "zero")), None)
        if self.prefix_projection and start is not None:
            raise ConfigError(
                f"{type(self).__name__}: {start} gives keys and values, which the MLP of prefix_projection=True cannot "
                "start from; set prefix_projection=False",
                field="prefix_projection",
                found=True,
            )

    def derived(self, width: int) -> dict[str, Any]:
        return {"encoder_hidden_size": self.encoder_hidden_size or width}


def p_tuning_v2_options(task_type: str | TaskType | None) -> dict[str, Any]:
    """What P-tuning v2 sets."""
    many = task_type in (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)
    return {"sites": "all", "num_virtual_tokens": 100 if many else 20}


class PrefixEncoder(KeyValueEncoder):
    """The trainable part: an embedding of all keys and values, or a smaller embedding and an MLP that spreads it.

    Without projection: `embedding` (P, width), width = sum of keys and values over sites = layers * 2 * heads * dim.
    With projection:    `embedding` (P, token_dim), then Linear -> Tanh -> Linear up to the same width.
    """

    def __init__(self, config: PrefixTuningConfig) -> None:
        super().__init__(config)
        width = sum(self.part_sizes)
        if config.prefix_projection:
            narrow = config.token_dim or max(heads * dim for heads, dim, *_ in self.shapes)
            hidden = config.encoder_hidden_size or narrow
            self.embedding = nn.Embedding(config.length, narrow)
            self.transform = nn.Sequential(nn.Linear(narrow, hidden), nn.Tanh(), nn.Linear(hidden, width))
        else:
            self.embedding = nn.Embedding(config.length, width)
        if config.init_weights == "zero":
            last = self.embedding if self.transform is None else self.transform[2]
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor | None = None) -> Tensor:
        """Rows of the prefix, (P, width); of the given virtual tokens (..., width), as in the article's listing."""
        rows = self.embedding.weight if tokens is None else self.embedding(tokens)
        return rows if self.transform is None else self.transform(rows)

    @torch.no_grad()
    def fill(self, rows: Tensor) -> None:
        """An MLP cannot be recovered from its output, so a projected encoder becomes a plain one."""
        rows = rows.detach().to(self.embedding.weight)
        if self.transform is None:
            self.embedding.weight.copy_(rows)
            return
        trainable = self.embedding.weight.requires_grad
        self.embedding = nn.Embedding.from_pretrained(rows.clone(), freeze=not trainable)
        self.transform = None


def _learning_rate(given: dict[str, Any]) -> float:
    return 1e-3 if given.get("prefix_projection") else 1e-2  # through the MLP each step moves every virtual token


METHOD = Method(
    PeftType.PREFIX_TUNING,
    PrefixTuningConfig,
    None,
    key_prefix="prompt_",
    graft=Prefix,
    encoder=PrefixEncoder,
    learning_rate=_learning_rate,
    train_options=twenty_tokens,
)
