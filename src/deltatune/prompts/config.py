"""What configs of virtual tokens share: `PromptLearningConfig`, and `KeyValueConfig` for keys and values."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from deltatune import bounded, checks
from deltatune.config import PeftConfig, config
from deltatune.errors import ConfigError

Layout = Literal["native", "peft"]
# What keys and values mean whose config does not say: "peft" under `deltatune.as_peft`, so that programs written for
# PEFT get the numbers that they got.
usual_layout: Layout = "native"
SITE_KINDS = ("default", "self", "encoder", "cross", "all")


@config
class PromptLearningConfig(PeftConfig):
    """Fields and meaning are PEFT's; all but the first are filled in from the model when they are left out.

    Attributes:
        num_virtual_tokens: Number of virtual tokens P.
        token_dim: Width of the keys of one layer (key heads * head dim); of an embedding where rows are put in front.
        num_transformer_submodules: 2 in encoder-decoders, else 1.
        num_attention_heads: Number of key heads of one layer.
        num_layers: Number of attentions that get keys and values.
        modules_to_save: Modules of the base that are trained and saved beside the prompt, such as a classifier.
    """

    # Whether, of two submodules, the second is used too: rows before the decoder's tokens.
    reaches_decoder: ClassVar[bool] = False

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

    @property
    def length(self) -> int:
        """The number of virtual tokens, which must be given."""
        if self.num_virtual_tokens is None:
            raise ConfigError(
                f"{type(self).__name__}: num_virtual_tokens is not set; 20 is a usual start", field="num_virtual_tokens"
            )
        return self.num_virtual_tokens


@config
class KeyValueConfig(PromptLearningConfig):
    """What methods share that hand learned keys and values to attentions.

    Attributes:
        layout: "native": every site has its own live prefix, which uses up no position. "peft": PEFT's numbers, with
            its position shift and its order of layers; files without our marker are read so. None: "native", and
            under `deltatune.as_peft` "peft" wherever PEFT's numbers are known and no `sites` are chosen.
        sites: Attentions that get a prefix: "default" (self-attention, in encoder-decoders the decoder's), "self" (the
            same), "encoder", "cross", "all", a regular expression for module paths, or a list of kinds and paths.
        init_text: Start from the keys and values of this text; needs `tokenizer_name_or_path`.
        init_token_ids: The same, as token ids.
        init_from: Start from the rows of a trained prefix on the same sites: its folder, or its name on this model. Of
            a longer one the first are taken; a shorter one is continued with rows drawn like its own.
        init_weights: "scaled" draws keys and values of the size that the model's own have; None, as PEFT, N(0, 1).
        tokenizer_name_or_path: Tokenizer for `init_text`.
        site_names: Module paths of the sites, filled in from the model.
        site_shapes: [key heads, key dim, value heads, value dim] of each site, filled in from the model.
    """

    # How to start is not saved: a file holds the result, and is read without a tokenizer.
    unsaved: ClassVar[frozenset[str]] = frozenset(
        {"init_text", "init_token_ids", "init_from", "init_weights", "tokenizer_name_or_path"}
    )
    # A file that PEFT wrote says nothing of a layout, and its numbers mean PEFT's.
    file_defaults: ClassVar[dict[str, str]] = {"layout": "peft"}

    layout: Layout | None = None
    sites: str | list[str] = "default"
    init_text: str | None = None
    init_token_ids: list[int] | None = None
    init_from: str | None = None
    init_weights: Literal["scaled"] | None = None
    tokenizer_name_or_path: str | None = None
    site_names: list[str] | None = None
    site_shapes: list[list[int]] | None = None

    def __post_init__(self) -> None:
        if self.layout is None and (usual_layout == "native" or self.sites != "default"):
            self.layout = "native"  # what is still open depends on the model
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        wanted = [self.sites] if isinstance(self.sites, str) else self.sites
        if not wanted:
            checks.refuse(type(self).__name__, "sites", self.sites, "a kind, a regular expression or names")
        for pattern in wanted if isinstance(self.sites, str) else ():
            bounded.check(type(self).__name__, "sites", pattern)
        if self.layout == "peft" and self.sites != "default":
            checks.refuse(type(self).__name__, "sites", self.sites, "'default' with layout='peft': PEFT knows no other")
        starts = [name for name in self.starts if getattr(self, name) is not None]
        if len(starts) > 1:
            raise ConfigError(
                f"{type(self).__name__}: {' and '.join(starts)} exclude each other; keep one", field=starts[0]
            )

    @property
    def starts(self) -> tuple[str, ...]:
        """Fields that each say how to start."""
        return ("init_weights", "init_text", "init_token_ids", "init_from")

    def derived(self, width: int) -> dict[str, Any]:
        """Further fields that follow from the width of the keys of one layer."""
        return {}

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


def twenty_tokens(given: dict[str, Any]) -> dict[str, Any]:
    """`train_options` of methods whose configs do not say how many virtual tokens there are."""
    return {"num_virtual_tokens": 20}
