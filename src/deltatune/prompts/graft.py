"""`Graft`: what a `PeftModel` needs of a method that acts outside of single layers, at the attention or the input."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from deltatune.config import PeftConfig
from deltatune.selection import Selection

if TYPE_CHECKING:
    from deltatune.prompts.config import PromptLearningConfig


class Graft:
    """One adapter of such a method on one model.

    Attributes:
        encoder: The trainable part; the `PeftModel` registers it as a module, frees and freezes it.
        takes_positions: Whether the virtual tokens use up positions of the base, as tokens do.
        root: How keys of modules that are trained whole beside it begin in its file. PEFT puts no tuner around a model
            with a prompt, so they are one step shorter than those of layer methods.
        place: Where it acts, in words.
        gives_key_values: Whether it hands keys and values to attentions, as `deltatune.prompts.key_values:Prefix` does.
        identity_at_birth: Whether a fresh adapter leaves the output as it was.
        verbs: Methods of its own that the `PeftModel` has too while the adapter is active.
        absent: What is said of a file without any of its tensors.
        unmergeable: What it is, and why it cannot be merged.
        reads: Arguments of a call beyond those of the base model, which it takes itself.
    """

    takes_positions: ClassVar[bool] = False
    root: ClassVar[str] = "base_model."
    place: ClassVar[str] = "the attentions"
    gives_key_values: ClassVar[bool] = False
    identity_at_birth: ClassVar[bool] = False
    verbs: ClassVar[tuple[str, ...]] = ()
    absent: ClassVar[str] = "the file holds no tensor of its prompt"
    unmergeable: ClassVar[str] = "learned tokens, or their keys and values, which no weight can hold"
    reads: tuple[str, ...] = ()

    name: str
    config: Any
    encoder: nn.Module

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        config: PromptLearningConfig,
        name: str,
        selection: Selection,
        encoder: type[nn.Module],
    ) -> Graft:
        """Graft an adapter onto `model`, fill in the config from it; raises before any change.

        Args:
            selection: Says in every pass which adapters are active.
            encoder: Class of the trainable part, built from the filled-in config.
        """
        raise NotImplementedError

    def adopt(self, config: Any) -> None:
        """`config`, with the content of its own, is the one that the `PeftModel` shows from now on."""

    def detach(self) -> None:
        """Leave the model as it was before `attach`."""
        raise NotImplementedError

    def carried(self) -> AbstractContextManager[None]:
        """What a layer that checkpointing computes again has to run in, asked for while the layer runs forward."""
        return nullcontext()

    def penalty(self, model: nn.Module, labels: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
        """A term of the loss of a training step, after the pass with these labels; see `Adapter.penalty`."""
        return None

    # ----------------------------------------------------------------------------------------------------------- files

    def owns(self, key: str) -> bool:
        """Whether a key of a file is this adapter's, and not that of a module which is trained whole beside it."""
        return not key.startswith("base_model.")

    def file_tensors(self, format: str | None = None) -> dict[str, Tensor]:
        """What is saved; TargetError where it cannot be said in `format` (None: the adapter's own)."""
        raise NotImplementedError

    def file_config(self, format: str | None = None) -> dict[str, Any]:
        """Config entries that belong beside those tensors; an entry of `...` is left out of the file."""
        return {}

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file before they are checked, where another program writes them in another way."""
        return tensors

    def folders(self) -> dict[str, tuple[PeftConfig, dict[str, Tensor]]]:
        """Adapters that belong to it and are saved in subfolders of its own: their configs and tensors."""
        return {}

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take the content of a file; MismatchError, before anything changes, where it does not fit."""
        raise NotImplementedError
