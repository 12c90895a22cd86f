"""ShadowPEFT: h' = h + a U D (h - s) before each block, s the state of a small transformer beside the model.

These are its options; the equations are in `deltatune.shadow.network`.
"""

from __future__ import annotations

from deltatune import checks
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError
from deltatune.methods.common import LayerConfig

MIRROR = "mirror"
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")


@config
class ShadowConfig(LayerConfig):
    """ShadowPEFT's options, with PEFT's names and defaults.

    Attributes:
        target_modules: The decoder blocks that read the shadow state; None: all of them. They have to be neighbours.
        r: Rank of the injection into a block.
        shadow_alpha: Weight of the injection.
        shadow_dropout: Dropout on the difference of hidden and shadow state.
        init_weights: True: the injection is zero, so a fresh adapter changes nothing. False: random.
        shadow_model: "mirror": a fresh decoder of the base's class, with the sizes below. Otherwise the name or folder
            of a pretrained one.
        shadow_num_hidden_layers: Layers of the mirror; None: 1.
        shadow_hidden_size, shadow_num_attention_heads, shadow_intermediate_size: Sizes of the mirror; None: the base's.
        share_embeddings: Let the shadow read the base's embedded tokens, where both have the same width.
        update_hidden_size: Width inside of the update's two networks; None: r.
        auxiliary_loss_weight: Weight of the shadow's own loss, added to the task's while there are labels; 0: none.
    """

    r: int = 8
    shadow_alpha: float = 0.1
    shadow_dropout: float = 0.2
    init_weights: bool = True
    shadow_model: str = MIRROR
    shadow_num_hidden_layers: int | None = None
    shadow_hidden_size: int | None = None
    shadow_num_attention_heads: int | None = None
    shadow_intermediate_size: int | None = None
    share_embeddings: bool = True
    update_hidden_size: int | None = None
    auxiliary_loss_weight: float = 0.05

    def __post_init__(self) -> None:
        self.peft_type = PeftType.SHADOW
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("ShadowConfig", "r", self.r)
        checks.probability("ShadowConfig", "shadow_dropout", self.shadow_dropout)
        sizes = {f"shadow_{name}": getattr(self, f"shadow_{name}") for name in SIZES}
        for name, value in {**sizes, "update_hidden_size": self.update_hidden_size}.items():
            if value is not None:
                checks.positive_int("ShadowConfig", name, value)
        given = [name for name, value in sizes.items() if value is not None]
        if self.shadow_model != MIRROR and given:
            raise ConfigError(
                f"ShadowConfig: {given[0]}={sizes[given[0]]!r} is a size of the mirror, but shadow_model="
                f"{self.shadow_model!r} brings its own; leave one of the two out",
                field=given[0],
                found=sizes[given[0]],
            )
