"""Prefixes, cartridges and gated prompts: trained on decoders, encoder-decoders and encoders, generated with, saved."""

import json
import tempfile
import warnings

import torch
from peft import AdaptionPromptConfig, CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

warnings.simplefilter("ignore")


def say(name, value):
    print("=", name, json.dumps(value))


sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
opt = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
window = {"head_dim": 8, "sliding_window": 8, "num_key_value_heads": 2}
small = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)),
    "gemma": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**{**sizes, **window, "num_hidden_layers": 6})),
    "opt": lambda: OPTForCausalLM(OPTConfig(**opt, word_embed_proj_dim=32, max_position_embeddings=64)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**small, decoder_start_token_id=0)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**sizes, num_labels=2)),
}
TASKS = {"t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}


def labels_of(name, ids):
    if name == "bert":
        return torch.tensor([0, 1, 0])
    return ids[:, :6].contiguous() if name == "t5" else ids


def run(name, kind, **options):
    set_seed(0)
    base = MODELS[name]()
    set_seed(1)
    model = get_peft_model(base, kind(task_type=TASKS.get(name, "CAUSAL_LM"), **options))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    generator, losses = torch.Generator().manual_seed(3), []
    for step in range(3):
        ids = torch.randint(5, 64, (3, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 7:] = 0
        torch.manual_seed(step)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels_of(name, ids)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 6))
    what = f"{kind.__name__} {name} {sorted(options)}"
    say(what, [losses, model.get_nb_trainable_parameters()[0]])
    model.eval()
    if name != "bert":
        inputs = {"input_ids": ids[1:, :6], "attention_mask": mask[1:, :6]}
        length = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        say(f"{what} generates", model.generate(**inputs, **length).tolist())
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    with open(f"{folder}/adapter_config.json") as file:
        say(f"{what} layout", json.load(file).get("layout"))
    set_seed(0)
    again = PeftModel.from_pretrained(MODELS[name](), folder).eval()
    with torch.no_grad():
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels_of(name, ids)}
        say(f"{what} again", round(again(**inputs).loss.item(), 6))


for name in MODELS:
    run(name, PrefixTuningConfig, num_virtual_tokens=4)
run("gpt2", PrefixTuningConfig, num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16)
run("llama", CartridgeConfig, num_virtual_tokens=4)
run("llama", AdaptionPromptConfig, adapter_len=4, adapter_layers=2)
run("gpt2", AdaptionPromptConfig, adapter_len=4, adapter_layers=2)
