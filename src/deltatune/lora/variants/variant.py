"""What a variant of LoRA may change: the matrices behind A and B, how x meets A, the output, the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from deltatune.adapter import LinearMap
from deltatune.calls import Value

if TYPE_CHECKING:
    from deltatune.methods.lora import LoRA


@dataclass
class Pass:
    """One pass through an adapted layer.

    Attributes:
        layer: The layer below the adapter.
        x: Its input.
        dropped: The same after the adapter's dropout; the same object where there is none.
        y: The layer's output.
        A: (r, in), and B (out, r): the update that trains, scale and all, is B A.
        values: What the adapter knows of the call, by name.
    """

    layer: LinearMap
    x: Any
    dropped: Any
    y: Tensor
    A: Tensor
    B: Tensor
    values: dict[str, Any]


class Variant(nn.Module):
    """One option of LoRA at one layer. Methods say what it changes; those inherited from here change nothing.

    Tensors are called as in PEFT's files.

    Class attributes, where an instance may have its own:
        field: The field of LoraConfig that asks for it.
        kinds: Kinds of layers that its maths allows.
        starts: Values of init_lora_weights that it allows; None for all.
        summand: True, or the reason why the output is not that of the layer plus an update.
        mergeable, pointwise, identity_at_birth, learns_in_eval: As of an adapter.
        views: Attributes that programs read per adapter on a layer.
    """

    field: ClassVar[str]
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "conv"})
    starts: ClassVar[tuple[Any, ...] | None] = None
    summand: ClassVar[bool | str] = True
    mergeable: bool | str = True
    pointwise: bool | str = True
    identity_at_birth: bool | str = True
    learns_in_eval: bool | str = True
    penalises: ClassVar[bool] = False
    reads: tuple[Value, ...] = ()
    views: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def asked(cls, config: Any) -> bool:
        return getattr(config, cls.field) not in (None, False)

    @classmethod
    def check(cls, config: Any) -> None:
        """What it needs of the config besides its own options; ConfigError."""

    @classmethod
    def build(cls, layer: LinearMap, config: Any, path: str, r: int) -> Variant | None:
        """The variant at one layer; None where the options leave that layer out.

        Raises:
            ConfigError: The options do not fit the layer.
        """
        return cls()

    # ------------------------------------------------------------------------------------------------ the factors

    def down_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the trained A, given what it would be without this."""
        return shape

    def up_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def begin(self, lora: LoRA, layer: LinearMap) -> None:
        """The factors have their start."""

    def drawn(self, A: Tensor) -> Tensor:
        """What is used in place of a trained A in one pass."""
        return A

    def down(self, A: Tensor) -> Tensor:
        """The matrix (r, in) that stands behind a trained A."""
        return A

    def up(self, B: Tensor) -> Tensor:
        return B

    def frozen(self) -> tuple[Tensor, Tensor] | None:
        """A (R, in) and B (out, R) of a product B A that is added to the weight too and does not train."""
        return None

    # ------------------------------------------------------------------------------------------- weight and output

    def adapt(self, weight: Tensor) -> Tensor:
        """W + B A -> W'."""
        return weight

    def project(self, x: Any, A: Tensor, layer: LinearMap) -> Tensor | None:
        """x A^T; None: as the layer does it."""
        return None

    def output(self, out: Tensor, at: Pass, lora: LoRA) -> Tensor:
        """What the output becomes after variants before this one have made `out` of it."""
        return out

    # ---------------------------------------------------------------------------------------------------- training

    def penalty(self, lora: LoRA) -> Tensor | None:
        return None

    def kept_tensors(self) -> dict[str, Tensor]:
        """What files hold though it does not train."""
        return {}

    def file_tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **self.kept_tensors()}
