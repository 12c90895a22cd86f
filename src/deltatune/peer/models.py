"""PEFT's tuner classes, `LoraModel(model, config, "default")` and its like, and the tables of them by method.

What such a call gives is a `deltatune.tuner.Tuner`, the one tuner for all methods; the class says of which it has one.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from deltatune.config import PeftConfig, PeftType
from deltatune.functional import set_peft_model_state_dict
from deltatune.model import PeftModel
from deltatune.peer.kinds import LAYERS, Kind
from deltatune.peer.methods import PREFIXES, PROMPTS, TUNERS, Named
from deltatune.peer.targets import usual
from deltatune.registry import METHODS
from deltatune.tuner import Tuner


class TunerKind(Kind):
    """The class of PEFT's tuner classes."""

    named: Named

    def __call__(
        cls,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tuner:
        """The model under adapters, without a `PeftModel` around it.

        Args:
            peft_config: The config of the adapter, or those of several by name.
            state_dict: Tensors under the keys of an adapter's file, to start from.
        """
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        first, *others = configs
        made = PeftModel(model, configs[first], first)
        for name in others:
            made.add_adapter(name, configs[name])
        if state_dict is not None:
            set_peft_model_state_dict(made, state_dict, adapter_name)
        return made.base_model


def _tuner(name: str) -> Any:
    named = next(named for named in TUNERS if named.model == name)

    def test(tuner: Any) -> bool:
        return isinstance(tuner, Tuner) and any(c.peft_type == named.peft_type for c in tuner.peft_config.values())

    values = {
        "named": named,
        "test": staticmethod(test),
        "prefix": PREFIXES.get(named.peft_type, METHODS[named.peft_type].key_prefix),
        "tuner_layer_cls": LAYERS.get(named.folder, {}).get(named.layer),
        "target_module_mapping": usual(named.peft_type),
        "__doc__": f"The base model under adapters of {named.peft_type}.",
        "__module__": __name__,
    }
    return TunerKind(name, (), values)


LoraModel = _tuner("LoraModel")
AdaLoraModel = _tuner("AdaLoraModel")
AdamssModel = _tuner("AdamssModel")
AdaptionPromptModel = _tuner("AdaptionPromptModel")
BeftModel = _tuner("BeftModel")
BOFTModel = _tuner("BOFTModel")
C3AModel = _tuner("C3AModel")
DeftModel = _tuner("DeftModel")
DeloraModel = _tuner("DeloraModel")
FourierFTModel = _tuner("FourierFTModel")
FrodModel = _tuner("FrodModel")
GloraModel = _tuner("GloraModel")
GraloraModel = _tuner("GraloraModel")
HiraModel = _tuner("HiraModel")
HRAModel = _tuner("HRAModel")
IA3Model = _tuner("IA3Model")
LilyModel = _tuner("LilyModel")
LNTuningModel = _tuner("LNTuningModel")
LoHaModel = _tuner("LoHaModel")
LoKrModel = _tuner("LoKrModel")
MissModel = _tuner("MissModel")
OFTModel = _tuner("OFTModel")
OSFModel = _tuner("OSFModel")
PeanutModel = _tuner("PeanutModel")
PolyModel = _tuner("PolyModel")
PsoftModel = _tuner("PsoftModel")
PveraModel = _tuner("PveraModel")
RandLoraModel = _tuner("RandLoraModel")
RoadModel = _tuner("RoadModel")
ShadowModel = _tuner("ShadowModel")
ShiraModel = _tuner("ShiraModel")
SupertuningModel = _tuner("SupertuningModel")
TinyLoraModel = _tuner("TinyLoraModel")
TrainableTokensModel = _tuner("TrainableTokensModel")
UniLoraModel = _tuner("UniLoraModel")
VBLoRAModel = _tuner("VBLoRAModel")
VeraModel = _tuner("VeraModel")
WaveFTModel = _tuner("WaveFTModel")
XLoraModel = _tuner("XLoraModel")

_BUILT = {PeftType(named.peft_type): named for named in (*TUNERS, *PROMPTS)}

PEFT_TYPE_TO_CONFIG_MAPPING: dict[Any, type[PeftConfig]] = {name: METHODS[name].config for name in _BUILT}
PEFT_TYPE_TO_TUNER_MAPPING: dict[Any, Any] = {
    name: globals().get(named.model, METHODS[name].encoder) for name, named in _BUILT.items()
}
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[Any, Any] = {
    name: PEFT_TYPE_TO_TUNER_MAPPING[name] for name, named in _BUILT.items() if named in TUNERS
}
PEFT_TYPE_TO_PREFIX_MAPPING: dict[Any, str] = {n: PREFIXES.get(n.value, METHODS[n].key_prefix) for n in _BUILT}
