"""transformers' own adapter interface: the model carries adapters without a PeftModel around it."""

import json
import tempfile

import torch
from peft import LoHaConfig, LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


def say(name, value):
    print("=", name, json.dumps(value))


sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
folder = tempfile.mkdtemp()
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)).save_pretrained(f"{folder}/base")
ids = torch.arange(12).reshape(2, 6)


def end(model):
    with torch.no_grad():
        return [round(x, 5) for x in model(ids).logits[:, -1, :3].flatten().tolist()]


def train(model, steps=4):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


torch.manual_seed(1)
model = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
say("bare", end(model))
model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), adapter_name="one")
say("trainable", sum(p.numel() for p in model.parameters() if p.requires_grad))
say("losses", train(model))
model.add_adapter(LoHaConfig(r=2, target_modules=["k_proj"]), adapter_name="two")
say("active", [model.active_adapters(), sorted(model.peft_config)])
say("losses of two", train(model))
say("two", end(model))
model.set_adapter("one")
say("one", end(model))
model.set_adapter(["one", "two"])
say("both", end(model))
model.disable_adapters()
say("off", end(model))
model.enable_adapters()
say("on", end(model))
model.set_adapter("one")
state = model.get_adapter_state_dict("one")
say("state", [sorted(state)[:3], sorted(model.get_adapter_state_dict("two"))[:2]])
say("live", sorted(k for k in model.state_dict() if "lora" in k or "hada" in k)[:8])

model.save_pretrained(f"{folder}/one")
loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
loaded.load_adapter(f"{folder}/one", adapter_name="again")
say("loaded", [end(loaded), loaded.active_adapters(), any(p.requires_grad for p in loaded.parameters())])
direct = AutoModelForCausalLM.from_pretrained(f"{folder}/one")  # the base that the adapter's config names
say("direct", [end(direct), sorted(direct.peft_config)])
given = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
given.load_adapter(
    adapter_state_dict={f"base_model.model.{key}": value for key, value in state.items()},
    peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    is_trainable=True,
)
say("given", [end(given), sum(p.numel() for p in given.parameters() if p.requires_grad)])
model.delete_adapter("one")
say("deleted", [sorted(model.peft_config), end(model)])
try:
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), adapter_name="two")
except ValueError as error:
    say("twice", str(error))
