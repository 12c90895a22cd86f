"""accelerate around an adapted model: preparing, unwrapping, saving, the state dicts of FSDP's helper."""

import json
import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel, fsdp_utils, is_peft_model
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn


def say(name, value):
    print("=", name, json.dumps(value))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.second(self.first(x).relu())


class Net(nn.Module):
    _no_split_modules = ["Block"]

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


torch.manual_seed(0)
model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["first", "second"], modules_to_save=["head"]))
accelerator = Accelerator(cpu=True)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
prepared, optimizer = accelerator.prepare(model, optimizer)
x, y = torch.randn(6, 8), torch.randint(2, (6,))
losses = []
for _ in range(4):
    with accelerator.accumulate(prepared):
        loss = nn.functional.cross_entropy(prepared(x), y)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    losses.append(loss.item())
say("losses", losses)
say("unwrapped", [is_peft_model(prepared), isinstance(accelerator.unwrap_model(prepared), PeftModel)])
say("extracted", type(extract_model_from_parallel(torch.nn.DataParallel(model))).__name__)
folder = tempfile.mkdtemp()
accelerator.save_state(f"{folder}/state")
expected = prepared(x).tolist()
with torch.no_grad():
    for parameter in prepared.parameters():
        parameter.zero_()
accelerator.load_state(f"{folder}/state")
say("restored", prepared(x).tolist() == expected)

state = fsdp_utils._get_model_state_dict(model, adapter_only=True)
say("adapter only", sorted(state)[:4])
fsdp_utils._set_model_state_dict(model, {key: value * 0 for key, value in state.items()}, adapter_only=True)
say("set", model(x).tolist())
whole = {key: value + 1 for key, value in model.state_dict().items()}
own = get_peft_model_state_dict(model, state_dict=whole)
say("given values", [sorted(own)[:2], float(own["base_model.model.head.bias"][0])])
set_peft_model_state_dict(model, own)
say("out", model(x).tolist())
say("policy", callable(fsdp_auto_wrap_policy(model)))
