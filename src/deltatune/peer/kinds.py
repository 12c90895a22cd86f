"""Classes that stand for PEFT's in `isinstance`: what a wrapped layer or a tuner is follows from what it holds.

deltatune has one wrapper for all methods, so `isinstance(module, LoraLayer)` asks the wrapper, not its class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from deltatune.bases import as_map
from deltatune.copies import TrainedCopies
from deltatune.errors import StateError
from deltatune.fused.adapters import ParameterAdapters
from deltatune.layer import AdaptedLayer
from deltatune.lora.variants.arrow import Router
from deltatune.methods.trainable_tokens import TokenAdapter
from deltatune.peer.methods import PROMPTS, TUNERS, Named
from deltatune.registry import METHODS
from deltatune.tuner import Tuner

Test = Callable[[Any], bool]


class Kind(type):
    """The class of classes without instances of their own: `test` says what belongs to one.

    What a program derives from such a class is an ordinary class.
    """

    test: Test | None

    def __new__(mcs, name: str, bases: tuple, values: dict[str, Any]) -> Any:
        return super().__new__(mcs, name, bases, {"test": None, **values})

    def __instancecheck__(cls, instance: Any) -> bool:
        return super().__instancecheck__(instance) if cls.test is None else cls.test(instance)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.test is None:
            return super().__call__(*args, **kwargs)
        raise StateError(
            f"{cls.__name__} answers isinstance() and nothing else in deltatune, whose layers are all AdaptedLayer; "
            "get_peft_model() and inject_adapter_in_model() make them",
            found=cls.__name__,
            hint="call get_peft_model or inject_adapter_in_model",
        )


def kind(name: str, test: Test, doc: str, **values: Any) -> Any:
    return Kind(name, (), {"test": staticmethod(test), "__doc__": doc, "__module__": __name__, **values})


def _holds(classes: tuple[type, ...], base: Test = lambda layer: True) -> Test:
    def test(module: Any) -> bool:
        if not isinstance(module, AdaptedLayer):
            return False
        return any(isinstance(adapter, classes) for adapter in module.adapters.values()) and base(module.base_layer)

    return test


def _matrix(layer: nn.Module) -> bool:
    found = None if isinstance(layer, nn.MultiheadAttention) else as_map(layer)
    return found is not None and found.kind == "linear"


_BASES: dict[str, Test] = {
    "Linear": _matrix,
    "Embedding": lambda layer: isinstance(layer, nn.Embedding),
    "Conv1d": lambda layer: isinstance(layer, nn.Conv1d),
    "Conv2d": lambda layer: isinstance(layer, nn.Conv2d),
    "Conv3d": lambda layer: isinstance(layer, nn.Conv3d),
    "MultiheadAttention": lambda layer: isinstance(layer, nn.MultiheadAttention),
    "ParamWrapper": lambda layer: not isinstance(layer, nn.MultiheadAttention) and as_map(layer) is None,
}


def _adapters(*types: str) -> tuple[type, ...]:
    found = tuple(adapter for name in types if (adapter := METHODS[name].adapter) is not None)
    return (*found, Router, ParameterAdapters) if "LORA" in types else found


def _is_called(name: str) -> Test:
    """Whether a layer is of a class that is called so; for packages that may not be there."""
    return lambda layer: any(parent.__name__ == name for parent in type(layer).__mro__)


def _of_method(named: Named) -> dict[str, Any]:
    """Its layer classes by name."""
    types = ("LORA", "ADALORA") if named.peft_type == "LORA" else (named.peft_type,)  # both are LoRA layers in PEFT
    classes = _adapters(*types)
    say = f"A layer with an adapter of {named.peft_type}."
    values = {"adapter_layer_names": named.tensors, "other_param_names": ()}
    own = {named.layer: kind(named.layer, _holds(classes), say, **values)}
    for name in named.kinds:
        base = next(test for ending, test in _BASES.items() if name.endswith(ending))
        own[name] = kind(name, _holds(classes, base), say, **values)
    return own


LAYERS: dict[str, dict[str, Any]] = {named.folder: _of_method(named) for named in TUNERS if named.layer}

_TENSORS = {adapter: n.tensors for n in reversed(TUNERS) if n.layer for adapter in _adapters(n.peft_type)}


def tensor_names(layer: AdaptedLayer) -> tuple[str, ...]:
    """What PEFT's classes of this layer's adapters call the tensors that they may hold."""
    kinds = [type(adapter.core) for adapter in layer.adapters.values()]  # type: ignore[union-attr]
    return tuple(name for kind in kinds for name in _TENSORS.get(kind, ()))


BaseTunerLayer = kind(
    "BaseTunerLayer",
    lambda module: isinstance(module, AdaptedLayer),
    "A layer with adapters.",
    adapter_layer_names=(),
    other_param_names=(),
)
LoraLayer = LAYERS["lora"]["LoraLayer"]
LycorisLayer = kind("LycorisLayer", _holds(_adapters("LOHA", "LOKR")), "A LoHa or LoKr layer.")
Linear8bitLt, Linear4bit = (
    kind(name, _holds(_adapters("LORA"), _is_called(name)), f"LoRA on bitsandbytes' {name}.")
    for name in ("Linear8bitLt", "Linear4bit")
)
AuxiliaryTrainingWrapper = kind(
    "AuxiliaryTrainingWrapper",
    lambda module: isinstance(module, TrainedCopies) or TrainableTokensWrapper.test(module),
    "A module that trains beside an adapter.",
)
ModulesToSaveWrapper = TrainedCopies
TrainableTokensWrapper = kind(
    "TrainableTokensWrapper", _holds((TokenAdapter,)), "An embedding of which some rows train beside an adapter."
)
BaseTuner = kind("BaseTuner", lambda module: isinstance(module, Tuner), "The base model under its adapters.")
MixedModel = kind(
    "MixedModel",
    lambda module: isinstance(module, Tuner) and len({c.peft_type for c in module.peft_config.values()}) > 1,
    "The base model under adapters of several methods.",
)
BasePromptEncoder = kind(
    "BasePromptEncoder",
    lambda module: isinstance(module, tuple(m.encoder for n in PROMPTS if (m := METHODS[n.peft_type]).encoder)),
    "What a prompt method trains.",
)
