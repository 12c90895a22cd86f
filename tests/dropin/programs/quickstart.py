"""The way through PEFT's README: adapt a model, train it, save the adapter, load it in two ways, generate, merge."""

import json
import tempfile

import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    TaskType,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


def say(name, value):
    print("=", name, json.dumps(value))


sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
torch.manual_seed(0)
folder = tempfile.mkdtemp()
LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)).save_pretrained(f"{folder}/base")

torch.manual_seed(1)
model = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
peft_config = LoraConfig(
    r=4, lora_alpha=16, lora_dropout=0.1, task_type=TaskType.CAUSAL_LM, target_modules=["q_proj", "v_proj"], bias="none"
)
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()
say("trainable", model.get_nb_trainable_parameters())
say("class", [type(model).__name__, isinstance(model, PeftModel), isinstance(model, PeftModelForCausalLM)])
say("names", sorted(name for name, p in model.named_parameters() if p.requires_grad))

model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
losses = []
for step in range(8):
    ids = torch.randint(0, 64, (4, 10), generator=torch.Generator().manual_seed(step % 2))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
say("losses", losses)

model.save_pretrained(f"{folder}/adapter")
config = PeftConfig.from_pretrained(f"{folder}/adapter")
say("config", [config.peft_type, config.task_type, config.r, config.base_model_name_or_path.endswith("/base")])

model.eval()
ids = torch.arange(12).reshape(2, 6)
expected = model(ids).logits
again = PeftModel.from_pretrained(
    AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path), f"{folder}/adapter"
)
say("reloaded", torch.allclose(again(ids).logits, expected, atol=1e-6))
say("frozen", [any(p.requires_grad for p in again.parameters()), again.training])
auto = AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapter", is_trainable=True)
say("auto", [torch.allclose(auto.eval()(ids).logits, expected, atol=1e-6), auto.get_nb_trainable_parameters()])
say("logits", expected[:, -1, :8].tolist())
say("tokens", auto.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0).tolist())
with model.disable_adapter():
    say("disabled", model(ids).logits[:, -1, :4].tolist())

merged = again.merge_and_unload()
say("merged", [type(merged).__name__, torch.allclose(merged(ids).logits, expected, atol=1e-4)])
say("keys", sorted(merged.state_dict())[:4])
