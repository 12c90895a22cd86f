"""Recipes of TRL and transformers: whole modules beside LoRA, other methods, rewards, KTO, pipelines."""

import json
import os
import tempfile

import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, OFTConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)
from trl import KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer


def say(name, value):
    print("=", name, json.dumps(value))


TEXT = "a an the cat dog bird sees hears likes small big red blue today now not and then"
WORDS = TEXT.split()


def tokenizer():
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **marks)


def sentences(count):
    return [" ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(1, 6)) for i in range(count)]


folder = tempfile.mkdtemp()
set_seed(0)
sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2, pad_token_id=0)).save_pretrained(f"{folder}/base")
tokenizer().save_pretrained(f"{folder}/base")


COMMON = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True,
    "bf16": False, "disable_tqdm": True, "seed": 5, "max_steps": 3,
}  # fmt: skip
chosen, rejected = sentences(20)[4:], sentences(23)[7:]
lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sft(config, **options):
    arguments = SFTConfig(output_dir=f"{folder}/sft", max_length=16, save_strategy="no", **{**COMMON, **options})
    data = Dataset.from_dict({"text": sentences(64)})
    trainer = SFTTrainer(
        model=f"{folder}/base", args=arguments, train_dataset=data, processing_class=tokenizer(), peft_config=config
    )
    return [losses(trainer), trainer.model.get_nb_trainable_parameters()]


whole = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
say("whole modules", sft(whole, packing=True, gradient_checkpointing=True))
say("tokens", sft(LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [4, 5]})))
scaled = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
say("ia3", sft(scaled))
say("oft", sft(OFTConfig(oft_block_size=8, target_modules=["q_proj"], task_type="CAUSAL_LM")))
say("prompt", sft(PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")))
say("noise", sft(lora, neftune_noise_alpha=5))

scorer = LlamaForSequenceClassification.from_pretrained(f"{folder}/base", num_labels=1)
scorer.config.pad_token_id = 0
reward = RewardTrainer(
    model=scorer,
    args=RewardConfig(output_dir=f"{folder}/reward", max_length=24, save_strategy="no", **COMMON),
    train_dataset=Dataset.from_dict({"chosen": chosen, "rejected": rejected}),
    processing_class=tokenizer(),
    peft_config=LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"], modules_to_save=["score"]),
)
say("reward", losses(reward))
rows = {"prompt": sentences(16), "completion": [f" {text}" for text in chosen], "label": [True, False] * 8}
kto = KTOTrainer(
    model=f"{folder}/base",
    args=KTOConfig(output_dir=f"{folder}/kto", max_length=24, save_strategy="no", **COMMON),
    train_dataset=Dataset.from_dict(rows),
    processing_class=tokenizer(),
    peft_config=lora,
)
say("kto", losses(kto))

native = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
set_seed(3)
native.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
texts = [(torch.arange(start, start + 6) % 20) + 4 for start in range(24)]
trainer = Trainer(
    model=native,
    args=TrainingArguments(output_dir=f"{folder}/native", save_steps=2, **COMMON),
    train_dataset=[{"input_ids": text, "labels": text} for text in texts],
)
say("native", losses(trainer))
say(
    "native files", [name for name in sorted(os.listdir(f"{folder}/native/checkpoint-2")) if name.startswith("adapter")]
)

set_seed(4)
plain = get_peft_model(AutoModelForCausalLM.from_pretrained(f"{folder}/base"), LoraConfig(task_type="CAUSAL_LM"))
say(
    "pipeline",
    pipeline("text-generation", model=plain, tokenizer=tokenizer())("a cat", max_new_tokens=4, do_sample=False),
)
plain.save_pretrained(f"{folder}/saved")
tokenizer().save_pretrained(f"{folder}/saved")
say("of a folder", pipeline("text-generation", model=f"{folder}/saved")("a cat", max_new_tokens=4, do_sample=False))
