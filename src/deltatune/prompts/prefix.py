"""Prefix tuning: K' = [P_K; K], V' = [P_V; V] in every attention.   https://arxiv.org/abs/2101.00190

How it works, from top to bottom:

1. `PrefixTuningConfig` says how many virtual tokens P a prefix has, and which attentions (the *sites*) get one.
2. `PrefixEncoder` holds what is trained. It returns one row per virtual token, and a row is the keys and values of all
   sites side by side:

       row = [K of site 0 | V of site 0 | K of site 1 | V of site 1 | ...]        K of a site: heads * head dim

3. At the start of a forward pass the rows are cut into one key and one value tensor per site (`keys_values`), once.
4. When a site calls its attention function, its keys and values are put before those of the real tokens
   (`deltatune.prompts.attention`). Every query sees them; no position is used up, no cache and no mask is touched.
5. Gradients flow back through the attention into the rows. The base model is frozen: only the encoder is trained.

With `prefix_projection` the rows come out of a small MLP, which trains more steadily (section 4.3 of the paper). It is
needed for training only: its output, the *folded* prefix, is all that inference uses.
"""

from __future__ import annotations

import re
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Method
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError
from deltatune.prompts.config import PromptLearningConfig

SITE_KINDS = ("default", "self", "encoder", "cross", "all")


@config
class PrefixTuningConfig(PromptLearningConfig):
    """What a user sets.

    Attributes:
        encoder_hidden_size: Width of the MLP with `prefix_projection`; the width of one layer's keys when left out.
        prefix_projection: Whether the prefix comes out of a two-layer MLP.
        init_weights: None draws the prefix at random; "zero" starts with keys and values of zero.
        layout: "native": every site has its own live prefix, which uses up no position. "peft": PEFT's numbers, with
            its position shift and its order of layers; files without our marker are read so.
        sites: Attentions that get a prefix: "default" (self-attention, in encoder-decoders the decoder's), "self" (the
            same), "encoder", "cross", "all", a regular expression for module paths, or a list of kinds and paths.
        init_text: Start from the keys and values of this text; needs `tokenizer_name_or_path`.
        init_token_ids: The same, as token ids.
        tokenizer_name_or_path: Tokenizer for `init_text`.
        site_names: Module paths of the sites, filled in from the model.
        site_shapes: [key heads, key dim, value heads, value dim] of each site, filled in from the model.
    """

    # How to start is not saved: a file holds the result, and is read without a tokenizer.
    unsaved: ClassVar[frozenset[str]] = frozenset({"init_text", "init_token_ids", "tokenizer_name_or_path"})
    # A file that PEFT wrote says nothing of a layout, and its numbers mean PEFT's.
    file_defaults: ClassVar[dict[str, str]] = {"layout": "peft"}

    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    init_weights: Literal["zero"] | None = None
    layout: Literal["native", "peft"] = "native"
    sites: str | list[str] = "default"
    init_text: str | None = None
    init_token_ids: list[int] | None = None
    tokenizer_name_or_path: str | None = None
    site_names: list[str] | None = None
    site_shapes: list[list[int]] | None = None

    def __post_init__(self) -> None:
        if self.peft_type is None:
            self.peft_type = PeftType.PREFIX_TUNING
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        if self.encoder_hidden_size is not None:
            checks.positive_int(type(self).__name__, "encoder_hidden_size", self.encoder_hidden_size)
        wanted = [self.sites] if isinstance(self.sites, str) else self.sites
        if not wanted:
            checks.refuse(type(self).__name__, "sites", self.sites, "a kind, a regular expression or names")
        for pattern in wanted if isinstance(self.sites, str) else ():
            try:
                re.compile(pattern)
            except re.error as error:
                checks.refuse(type(self).__name__, "sites", pattern, f"a regular expression ({error})")
        if self.layout == "peft" and self.sites != "default":
            checks.refuse(type(self).__name__, "sites", self.sites, "'default' with layout='peft': PEFT knows no other")
        starts = [name for name in ("init_weights", "init_text", "init_token_ids") if getattr(self, name) is not None]
        if len(starts) > 1:
            raise ConfigError(
                f"{type(self).__name__}: {' and '.join(starts)} exclude each other; keep one", field=starts[0]
            )
        if self.prefix_projection and (self.init_text is not None or self.init_token_ids is not None):
            raise ConfigError(
                f"{type(self).__name__}: a prefix of real text is keys and values, which prefix_projection=True cannot "
                "start from; set prefix_projection=False",
                field="prefix_projection",
                found=True,
            )

    @property
    def length(self) -> int:
        """The number of virtual tokens, which must be given."""
        if self.num_virtual_tokens is None:
            raise ConfigError(
                f"{type(self).__name__}: num_virtual_tokens is not set; 20 is a usual start", field="num_virtual_tokens"
            )
        return self.num_virtual_tokens

    @property
    def shapes(self) -> list[list[int]]:
        """[key heads, key dim, value heads, value dim] of every site; from PEFT's fields when no model was seen yet."""
        if self.site_shapes is not None:
            return self.site_shapes
        if self.num_layers is None or self.token_dim is None or self.num_attention_heads is None:
            raise ConfigError(
                f"{type(self).__name__}: num_layers, token_dim and num_attention_heads are needed; get_peft_model "
                "fills them in",
                field="num_layers",
            )
        shape = [self.num_attention_heads, self.token_dim // self.num_attention_heads]
        return [shape * 2] * self.num_layers


class PrefixEncoder(nn.Module):
    """The trainable part: an embedding of all keys and values, or a smaller embedding and an MLP that spreads it.

    Without projection: `embedding` (P, width), width = sum of keys and values over sites = layers * 2 * heads * dim.
    With projection:    `embedding` (P, token_dim), then Linear -> Tanh -> Linear up to the same width.
    """

    def __init__(self, config: PrefixTuningConfig) -> None:
        super().__init__()
        self.shapes = [tuple(shape) for shape in config.shapes]
        self.layer_of_site = _layer_order(config)
        width = sum(self.part_sizes)
        self.transform: nn.Sequential | None = None
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

    @property
    def part_sizes(self) -> list[int]:
        """Columns of a row that belong to the keys and to the values of each site, in order."""
        return [size for h, d, hv, dv in self.shapes for size in (h * d, hv * dv)]

    def forward(self, tokens: Tensor | None = None) -> Tensor:
        """Rows of the prefix, (P, width); of the given virtual tokens (..., width), as in the article's listing."""
        rows = self.embedding.weight if tokens is None else self.embedding(tokens)
        return rows if self.transform is None else self.transform(rows)

    def keys_values(self) -> list[tuple[Tensor, Tensor]]:
        """Keys (heads, P, dim) and values of every site. One split: its backward writes the gradient once."""
        parts = self().split(self.part_sizes, dim=1)
        cut = [
            (_heads(parts[2 * layer], heads, dim), _heads(parts[2 * layer + 1], value_heads, value_dim))
            for layer, (heads, dim, value_heads, value_dim) in enumerate(self.shapes)
        ]
        return [cut[layer] for layer in self.layer_of_site]

    @torch.no_grad()
    def fill(self, rows: Tensor) -> None:
        """Take rows (P, width) as they are: the folded prefix of a file, or keys and values of real text.

        An MLP cannot be recovered from its output, so a projected encoder becomes a plain one.
        """
        rows = rows.detach().to(self.embedding.weight)
        if self.transform is None:
            self.embedding.weight.copy_(rows)
            return
        trainable = self.embedding.weight.requires_grad
        self.embedding = nn.Embedding.from_pretrained(rows.clone(), freeze=not trainable)
        self.transform = None


def _heads(columns: Tensor, heads: int, dim: int) -> Tensor:
    return columns.unflatten(1, (heads, dim)).transpose(0, 1)  # (P, heads * dim) -> (heads, P, dim)


def _layer_order(config: PrefixTuningConfig) -> list[int]:
    """Which part of the rows each site reads: its own, or in PEFT's encoder-decoders part 2i mod layers.

    PEFT doubles the list of keys and values for the two submodules and then cuts it into fours, so a decoder layer
    meets every second layer of the prefix; with an even number of layers the others are never used.
    """
    count = len(config.shapes)
    if config.layout == "peft" and config.num_transformer_submodules == 2:
        return [2 * site % count for site in range(count)]
    return list(range(count))


METHOD = Method(PeftType.PREFIX_TUNING, PrefixTuningConfig, None, key_prefix="prompt_")
