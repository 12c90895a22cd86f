"""The low-level interface: inject_adapter_in_model, peft.functional, tuner classes, state dicts, small helpers."""

import json

import peft
import torch
from peft import (
    LoraConfig,
    LoraModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.functional import delete_adapter, set_adapter, set_requires_grad
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lokr.layer import factorization
from peft.tuners.lora.layer import Conv2d, Embedding, Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, _get_submodules, shift_tokens_right, transpose
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


def say(name, value):
    print("=", name, json.dumps(value))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.conv(self.embed(x)[:, None])
        return self.head(self.body(x.transpose(1, 2).flatten(2)).mean(1))


def net():
    torch.manual_seed(0)
    return Net().eval()


x = torch.arange(12).reshape(3, 4)
config = LoraConfig(r=2, target_modules=["embed", "conv", "body.0"], modules_to_save=["head"], init_lora_weights=False)
torch.manual_seed(3)
model = inject_adapter_in_model(config, net(), adapter_name="a")
say("out", model(x).tolist())
say("kinds", [isinstance(model.embed, Embedding), isinstance(model.conv, Conv2d), isinstance(model.body[0], Linear)])
say(
    "not",
    [isinstance(model.body[0], Embedding), isinstance(model.body[2], LoraLayer), isinstance(model.head, LoraLayer)],
)
say("copies", [isinstance(model.head, ModulesToSaveWrapper), isinstance(model.head, AuxiliaryTrainingWrapper)])
say("layers", sorted(name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)))
state = get_peft_model_state_dict(model, adapter_name="a")
say("state", {key: list(value.shape) for key, value in sorted(state.items())})
inject_adapter_in_model(LoraConfig(r=2, target_modules=["body.2"], init_lora_weights=False), model, adapter_name="b")
set_adapter(model, "b")
say("b", [model(x).tolist(), model.body[2].active_adapters])
set_adapter(model, "a")
set_requires_grad(model, "a", False)
say("grads", sorted(n for n, p in model.named_parameters() if p.requires_grad))
delete_adapter(model, "b", prefix="lora_")
say("after delete", model(x).tolist())

torch.manual_seed(5)
other = inject_adapter_in_model(config, net(), adapter_name="z")
result = set_peft_model_state_dict(other, {key: value * 2 for key, value in state.items()}, adapter_name="z")
say("set", [other(x).tolist(), result.unexpected_keys])

torch.manual_seed(3)
tuner = LoraModel(net(), LoraConfig(r=2, target_modules=["body.0"], init_lora_weights=False), "default")
say("tuner", [tuner(x).tolist(), tuner.prefix, sorted(tuner.peft_config), type(tuner.model).__name__])
say("unloaded", tuner.merge_and_unload()(x).tolist())

custom = get_peft_model(net(), LoraConfig(target_modules=r"body\.[02]", r=2))
parent, target, name = _get_submodules(custom.base_model.model, "body.0")
say("submodules", [type(parent).__name__, isinstance(target, LoraLayer), name])
say("tables", [PEFT_TYPE_TO_CONFIG_MAPPING["LORA"].__name__, PEFT_TYPE_TO_TUNER_MAPPING["LORA"] is LoraModel])
say("isinstance", [isinstance(custom.base_model, LoraModel), isinstance(custom.base_model, peft.IA3Model)])
say("usual", TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["llama"])
say("small", [factorization(128), shift_tokens_right(torch.tensor([[4, -100, 5]]), 0, 1).tolist()])
say("transposed", list(transpose(torch.zeros(2, 3), True).shape))
say("versions", [peft.__version__, __import__("importlib.metadata").metadata.version("peft")])
