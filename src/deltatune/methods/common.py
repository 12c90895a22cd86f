"""Config fields that most layer methods share: which layers, and which modules are trained whole."""

from __future__ import annotations

from dataclasses import field
from typing import Any, ClassVar

from deltatune import checks
from deltatune.adapter import Method
from deltatune.config import PeftConfig, config
from deltatune.patterns import check_patterns


@config
class LayerConfig(PeftConfig):
    """Which layers get an adapter.

    Attributes:
        target_modules: Names (matched as whole path endings), a regular expression for the whole path, "all-linear", or
            None for the architecture's usual layers.
        exclude_modules: Names or a regular expression that win over the targets.
        layers_to_transform: Only these layer numbers; needs a list of names as targets.
        layers_pattern: Name of the module list that is numbered, when it cannot be told from the path.
        modules_to_save: Modules trained whole, as copies that are saved beside the adapter (a classifier's head, say).
    """

    # Fields that PEFT's config of this method lacks: they are resolved into `target_modules` before saving.
    beyond_peer: ClassVar[frozenset[str]] = frozenset()
    adapts_parameters: ClassVar[bool] = False  # whether it has a field `target_parameters` (`deltatune.fused`)
    target_parameters: ClassVar[Any] = None
    not_by_layer: ClassVar[tuple[str, ...]] = ()  # fields called `..._pattern` whose keys are no names of layers

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            setattr(self, name, checks.as_set(getattr(self, name)))
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        check_patterns(self)

    def beside(self) -> list[tuple[Method, LayerConfig]]:
        """Adapters of other kinds that come with this one, on layers of their own, under its name and in its file."""
        return []


@config
class LycorisConfig(LayerConfig):
    """What LoHa and LoKr, both from LyCORIS, have in common.

    Attributes:
        r: Rank of the factors.
        alpha: The update is scaled by alpha / r.
        rank_dropout: Share of the update's output features that are dropped, in training, for the whole batch.
        module_dropout: Probability that a layer's whole update is dropped, in training.
        use_effective_conv2d: Keep the kernel positions of a convolution in a core (r, r, kernel) of its own (FedPara's
            proposition 3) instead of joining them with the channels.
        rank_pattern: Layer name or regular expression -> another rank; `alpha_pattern` likewise.
    """

    r: int = 8
    alpha: int | float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        owner = type(self).__name__
        checks.positive_int(owner, "r", self.r)
        checks.finite_positive(owner, "alpha", self.alpha)
        checks.probability(owner, "rank_dropout", self.rank_dropout)
        checks.probability(owner, "module_dropout", self.module_dropout)


def all_linear(given: dict[str, Any]) -> dict[str, Any]:
    """`train_options` of methods that do best on every linear layer."""
    return {"target_modules": "all-linear"}
