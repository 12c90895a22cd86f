"""`Mixture`: one adapter of X-LoRA on one model, and its entry in the registry.   https://arxiv.org/abs/2402.07148"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from deltatune.adapter import Method
from deltatune.config import PeftConfig, PeftType
from deltatune.errors import AdapterNameError, ConfigError, TargetError
from deltatune.lora.variants import no_sum
from deltatune.methods.lora import LoRA
from deltatune.prompts.graft import Graft
from deltatune.selection import Selection
from deltatune.xlora import peer
from deltatune.xlora.classifier import Classifier
from deltatune.xlora.config import XLoraConfig
from deltatune.xlora.experts import Experts
from deltatune.xlora.stage import STAGE, Stage


class Mixture(Graft):
    """One mixture of experts.

    Attributes:
        encoder: The trainable part (`Classifier`).
        experts: Name, config and layers (by path) of each expert, in order.
        log: Weights of the passes since logging was switched on; None: it is off.
        latest: Weights of the last pass, (rows, tokens, layers, experts).
    """

    root: ClassVar[str] = "base_model.model."
    place: ClassVar[str] = "layers with experts"
    identity_at_birth: ClassVar[bool] = False
    absent: ClassVar[str] = "the file holds no tensor of its classifier"
    unmergeable: ClassVar[str] = "a mixture of LoRA adapters that differs from token to token, which no weight can hold"
    verbs: ClassVar[tuple[str, ...]] = (
        *("get_latest_scalings", "get_scalings_log", "enable_scalings_logging", "disable_scalings_logging"),
        *("clear_scalings_log", "get_bucketed_scalings_log", "set_topk_lora", "set_scaling_pass_value"),
        *("get_global_scaling_weight", "set_global_scaling_weight"),
    )

    encoder: Classifier

    def __init__(
        self,
        name: str,
        config: XLoraConfig,
        encoder: Classifier,
        stage: Stage,
        experts: list[tuple[str, PeftConfig, dict[str, LoRA]]],
    ) -> None:
        self.name, self.config, self.encoder, self.stage, self.experts = name, config, encoder, stage, experts
        self.logging, self.log = False, []
        self.latest: Tensor | None = None

    @classmethod
    def attach(
        cls, model: nn.Module, config: Any, name: str, selection: Selection, encoder: type[nn.Module]
    ) -> Mixture:
        """Load the experts, put them on their layers, and the hooks on the model; or raise, changing nothing."""
        from deltatune.inject import adapted_layers

        check_model(model)
        stage = vars(model).get(STAGE)
        if stage is not None and name in stage.mixtures:
            raise AdapterNameError(f"adapter {name!r} already is on this {type(model).__name__}", found=name)
        width = cast("Any", model).config.get_text_config().hidden_size
        if config.hidden_size not in (None, width):
            raise ConfigError(
                f"XLoraConfig: hidden_size={config.hidden_size} does not fit {type(model).__name__}, whose hidden "
                f"states have width {width}; leave it out",
                field="hidden_size",
                found=config.hidden_size,
                expected=width,
            )
        config.hidden_size, config.adapters = width, config.ordered()
        experts = _load(model, config, name, selection)
        try:
            paths = [p for p, layer in adapted_layers(model) if any(p in layers for _, _, layers in experts)]
            made: Any = encoder(config, len(experts), len(paths))  # type: ignore[call-arg]
            made.to(model.device).train(model.training)
        except BaseException:
            _take_off(model, name, len(experts))
            raise
        stage = vars(model).setdefault(STAGE, stage or Stage(model, selection))  # type: ignore[arg-type]
        mixture = stage.mixtures[name] = cls(name, config, made, stage, experts)
        layers = dict(adapted_layers(model))
        for number, layer in enumerate(layers[path] for path in paths):
            temporary = {index: _temporary(name, index) for index in range(len(experts))}
            own: Any = {i: layer.adapters.pop(key) for i, key in temporary.items() if key in layer.adapters}
            head = layer is cast("Any", model).get_output_embeddings()
            layer.add(name, Experts(name, paths[number], number, stage, own, head))
        return mixture

    def adopt(self, config: Any) -> None:
        self.config = self.encoder.config = config  # its options may be set while it is used

    def detach(self) -> None:
        self.stage.mixtures.pop(self.name, None)
        if not self.stage.mixtures:
            self.stage.close()

    def carried(self) -> AbstractContextManager[None]:
        return self.stage.carried()

    def weigh(self, hidden: Tensor) -> Tensor:
        """The weights of a pass, noted for who looks at them."""
        found = self.encoder(hidden)
        if not torch.compiler.is_compiling():
            self.latest = found
            if self.logging:
                self.log.append(found.detach())
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "latest": None, "log": []}

    # ------------------------------------------------------------------------------- PEFT's verbs, on the PeftModel too

    def get_latest_scalings(self) -> Tensor | None:
        return self.latest

    def get_scalings_log(self) -> list[Tensor]:
        return list(self.log)

    def enable_scalings_logging(self) -> None:
        self.logging = True

    def disable_scalings_logging(self) -> None:
        self.logging = False

    def clear_scalings_log(self) -> None:
        self.log = []

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """Number of tokens -> places in the log and the entries there."""
        found: dict[int, tuple[list[int], list[Tensor]]] = {}
        for place, entry in enumerate(self.log):
            places, entries = found.setdefault(entry.shape[1], ([], []))
            places.append(place)
            entries.append(entry)
        return found

    def set_topk_lora(self, value: int | None) -> None:
        self._set("top_k_lora", value)

    def set_scaling_pass_value(self, value: float | None) -> None:
        self._set("scaling_pass_value", 1 / len(self.experts) if value is None else value)

    def get_global_scaling_weight(self) -> float:
        return self.config.global_scaling_weight

    def set_global_scaling_weight(self, weight: float) -> None:
        self._set("global_scaling_weight", weight)

    def _set(self, field: str, value: Any) -> None:
        tried = copy.copy(self.config)
        setattr(tried, field, value)
        tried.validate()
        setattr(self.config, field, value)

    # ----------------------------------------------------------------------------------------------------------- files

    def owns(self, key: str) -> bool:
        return key.startswith(peer.CLASSIFIER)

    def file_tensors(self, format: str | None = None) -> dict[str, Tensor]:
        return {peer.CLASSIFIER + key: tensor for key, tensor in self.encoder.named_parameters()}

    def file_config(self, format: str | None = None) -> dict[str, Any]:
        return {} if self.config.modules_to_save else {"modules_to_save": ...}  # PEFT has no such field

    def folders(self) -> dict[str, tuple[PeftConfig, dict[str, Tensor]]]:
        """Each expert as the LoRA adapter that it is."""
        found = {}
        for name, config, layers in self.experts:
            parts = {f"{path}.{key}": t for path, lora in layers.items() for key, t in lora.file_tensors().items()}
            found[name] = (config, {self.root + key: tensor for key, tensor in parts.items()})
        return found

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        missing = [key for key in self.file_tensors() if key not in tensors]
        return peer.completed(tensors, missing, self.config.pieces)

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        from deltatune.state_dict import check  # which imports the registry, which imports this file

        own = self.file_tensors()
        check(tensors, own, f"the classifier of {self.name!r}")
        for key, parameter in own.items():
            parameter.data.copy_(tensors[key])


def check_model(model: nn.Module) -> None:
    """Raises TargetError where a model is none of transformers, or has an encoder and a decoder with other tokens."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or getattr(model.config, "is_encoder_decoder", False):
        raise TargetError(
            f"{type(model).__name__}: X-LoRA needs a decoder or an encoder of transformers, whose layers all see the "
            "same tokens; use one LoRA adapter here",
            found=type(model).__name__,
        )


def _load(
    model: nn.Module, config: XLoraConfig, name: str, selection: Selection
) -> list[tuple[str, PeftConfig, dict[str, LoRA]]]:
    """Every expert on the model, as a LoRA adapter under a name of its own; or none of them, where one fails."""
    from deltatune import inject
    from deltatune.loading import load_into
    from deltatune.storage import folder as storage

    experts = []
    try:
        for index, (expert, place) in enumerate({**(config.adapters or {}), **config.saved}.items()):
            saved = storage.read(place)
            storage.check_base(saved, model, allow=False)
            _check_expert(saved.config, expert, place)
            saved.config.inference_mode = True
            inject.graft(model, saved.config, _temporary(name, index), selection)
            load_into(model, _temporary(name, index), saved)
            layers = {path: layer.adapters for path, layer in inject.adapted_layers(model)}
            own = {p: held[_temporary(name, index)] for p, held in layers.items() if _temporary(name, index) in held}
            experts.append((expert, saved.config, own))
    except BaseException:
        _take_off(model, name, len(config.adapters or {}))
        raise
    return experts


def _check_expert(config: Any, expert: str, place: str) -> None:
    reason = None
    if config.peft_type != PeftType.LORA:
        reason = f"is {getattr(config.peft_type, 'value', config.peft_type)}, and experts are LoRA adapters"
    elif (more := no_sum(config)) is not None:
        reason = f"{more}, which cannot be weighted by token"
    elif config.modules_to_save or config.beside():
        reason = "trains whole modules or tokens too, which cannot be mixed"
    if reason is not None:
        raise ConfigError(
            f"XLoraConfig: adapters[{expert!r}]={place!r} {reason}; use plain LoRA adapters",
            field="adapters",
            found=place,
        )


def _temporary(name: str, index: int) -> str:
    return f"{name}:expert:{index}"


def _take_off(model: nn.Module, name: str, count: int) -> None:
    from deltatune.inject import remove

    for index in range(count):
        remove(model, _temporary(name, index))


METHOD = Method(
    PeftType.XLORA, XLoraConfig, None, key_prefix="internal_xlora_classifier", graft=Mixture, encoder=Classifier
)
