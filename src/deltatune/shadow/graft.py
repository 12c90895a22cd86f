"""`Shadow`: one adapter of ShadowPEFT on one model, and its entry in the registry."""

from __future__ import annotations

import copy
import inspect
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import Tensor, nn

from deltatune.adapter import Method
from deltatune.config import PeftType, TaskType
from deltatune.errors import AdapterNameError, TargetError
from deltatune.patterns import name_matches
from deltatune.prompts.graft import Graft
from deltatune.selection import Selection
from deltatune.shadow import backbone
from deltatune.shadow.config import ShadowConfig
from deltatune.shadow.loss import task_loss
from deltatune.shadow.network import Crossing, ShadowNetwork
from deltatune.shadow.stage import STAGE, Stage

_HEADS = ("score", "classifier")
_TOP = ("shadow_backbone", "shadow_projection", "shadow_head")


class Shadow(Graft):
    """One adapter's shadow beside one decoder.

    Attributes:
        encoder: The trainable part (`ShadowNetwork`).
        parameters: Names of what its backbone's forward takes.
    """

    root: ClassVar[str] = "base_model.model."
    place: ClassVar[str] = "a decoder's blocks"
    identity_at_birth: ClassVar[bool] = True
    unmergeable: ClassVar[str] = "a second transformer beside the base, whose states no weight can hold"

    encoder: ShadowNetwork

    def __init__(self, name: str, config: ShadowConfig, encoder: ShadowNetwork, stage: Stage, prefix: str) -> None:
        self.name, self.config, self.encoder, self.stage, self.prefix = name, config, encoder, stage, prefix
        self.shares_embeddings = backbone.shares_embeddings(encoder.shadow_backbone)
        self.parameters = tuple(inspect.signature(encoder.shadow_backbone.forward).parameters)

    @classmethod
    def attach(cls, model: nn.Module, config: Any, name: str, selection: Selection, encoder: type[nn.Module]) -> Shadow:
        """Find the blocks, build the network and put the hooks on; raises before any change."""
        path, decoder = backbone.decoder_of(model)
        list_name, blocks = backbone.blocks_of(decoder)
        prefix = f"{path}.{list_name}" if path else list_name
        stage = vars(decoder).get(STAGE)
        if stage is not None and name in stage.shadows:
            raise AdapterNameError(f"adapter {name!r} already has a shadow on this {type(model).__name__}", found=name)
        numbers = _chosen(model, config, prefix, len(blocks))
        own, projection = backbone.build(decoder, config)
        width = decoder.config.hidden_size
        crossings = {
            number: Crossing(
                width,
                config.r,
                config.update_hidden_size or config.r,
                config.shadow_alpha,
                config.shadow_dropout,
                config.init_weights,
                last=number == numbers[-1],
            )
            for number in numbers
        }
        network = encoder(own, projection, _own_head(model, config), crossings)
        network = network.to(decoder.device).float()  # half precision is for what does not train
        network.train(model.training)
        config.target_modules = {f"{prefix}.{number}" for number in numbers}
        config.layers_to_transform = config.layers_pattern = None  # said by the paths now
        if stage is None:
            stage = vars(decoder)[STAGE] = Stage(decoder, blocks, selection)
        shadow = stage.shadows[name] = cls(name, config, network, stage, prefix)  # type: ignore[arg-type]
        return shadow

    def detach(self) -> None:
        self.stage.shadows.pop(self.name, None)
        if not self.stage.shadows:
            self.stage.close()

    def carried(self) -> AbstractContextManager[None]:
        return self.stage.carried()

    def penalty(self, model: nn.Module, labels: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
        """The task's loss of the shadow alone, on s_0, times its weight; None without labels."""
        first = self.stage.latest.pop(self.name, None)
        if first is None or labels is None or self.config.auxiliary_loss_weight <= 0:
            return None
        loss = task_loss(model, self.encoder.shadow_head, first, labels, attention_mask)
        return None if loss is None else self.config.auxiliary_loss_weight * loss

    # ----------------------------------------------------------------------------------------------------------- files

    def owns(self, key: str) -> bool:
        return ".shadow_" in key

    def file_tensors(self, format: str | None = None) -> dict[str, Tensor]:
        found = {}
        for key, tensor in self.encoder.named_parameters():
            if self._frozen(key):
                continue
            found[self._file_key(key)] = tensor
        return found

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        from deltatune.state_dict import check  # which imports the registry, which imports this file

        own = self.file_tensors()
        unread = [key for key in tensors if key not in own and self._dead(key)]
        check({key: tensor for key, tensor in tensors.items() if key not in unread}, own, f"the shadow {self.name!r}")
        for key, parameter in own.items():
            parameter.data.copy_(tensors[key])

    def _dead(self, key: str) -> bool:
        """Whether PEFT saves it and nothing reads it: the last update of s, and a table beside the shared one."""
        last = f".{self.prefix}.{max(map(int, self.encoder.crossings))}.shadow_update_"
        return last in key or (self.shares_embeddings and _table_of(key))

    def _frozen(self, key: str) -> bool:
        return self.config.shadow_model != "mirror" and _table_of(key)

    def _file_key(self, key: str) -> str:
        """As PEFT writes it: the one method whose keys hold an adapter's name, always "default"."""
        top, _, rest = key.partition(".")
        if top in _TOP:
            return f"base_model.{top}.default.{rest}"
        number, part, rest = rest.split(".", 2)
        return f"{self.root}{self.prefix}.{number}.{part}.default.{rest}"


def _table_of(key: str) -> bool:
    return any(f".{name}.weight" in f".{key}" for name in ("embed_tokens", "wte", "word_embeddings", "embed_in"))


def _chosen(model: nn.Module, config: ShadowConfig, prefix: str, count: int) -> list[int]:
    """The numbers of the blocks that a config targets.

    Raises:
        TargetError: It names none, others than blocks of the decoder, or some that are no neighbours.
    """
    paths = [f"{prefix}.{number}" for number in range(count)]
    wanted, left = config.target_modules, config.layers_to_transform
    chosen = [
        number
        for number, path in enumerate(paths)
        if (wanted is None or name_matches(wanted, path))
        and not name_matches(config.exclude_modules, path)
        and (left is None or number in ([left] if isinstance(left, int) else left))
    ]
    if not chosen or chosen != list(range(chosen[0], chosen[-1] + 1)):
        what = "names none of" if not chosen else f"names {chosen}, which are not neighbours, of"
        raise TargetError(
            f"target_modules={wanted!r} {what} the {count} blocks {paths[0]!r} to {paths[-1]!r} of "
            f"{type(model).__name__}; leave it out for all of them",
            field="target_modules",
            found=chosen,
            expected=paths,
        )
    return chosen


def _own_head(model: nn.Module, config: ShadowConfig) -> nn.Module | None:
    """A copy of the classifier's head; language models use the base's for the shadow too."""
    if config.task_type != TaskType.SEQ_CLS:
        return None
    head = next((getattr(model, name) for name in _HEADS if isinstance(getattr(model, name, None), nn.Module)), None)
    head = getattr(head, "original_module", head)
    return copy.deepcopy(head)


METHOD = Method(PeftType.SHADOW, ShadowConfig, None, key_prefix="shadow_", graft=Shadow, encoder=ShadowNetwork)
