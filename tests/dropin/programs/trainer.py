"""transformers' Trainer with a PeftModel: checkpoints, resuming, the best model at the end."""

import json
import os
import tempfile

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed


def say(name, value):
    print("=", name, json.dumps(value))


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (count, 8), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 2} for row in ids]


def model():
    set_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    base = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=4, initializer_range=0.2))
    return get_peft_model(base, LoraConfig(task_type=TaskType.SEQ_CLS, r=4, lora_dropout=0.1))


folder = tempfile.mkdtemp()


def trainer(steps, path, **options):
    arguments = TrainingArguments(
        output_dir=path, max_steps=steps, per_device_train_batch_size=4, learning_rate=5e-3, weight_decay=0.3,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_steps=3, seed=7, **options,
    )  # fmt: skip
    return Trainer(model=model(), args=arguments, train_dataset=rows(32, 0), eval_dataset=rows(16, 1))


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


whole = trainer(6, f"{folder}/whole", eval_strategy="steps", eval_steps=3, load_best_model_at_end=True)
whole.train()
say("losses", losses(whole))
say("groups", [len(group["params"]) for group in whole.optimizer.param_groups])
say("evaluated", [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry])
say("best", [round(x, 4) for x in whole.predict(rows(4, 2)).predictions.flatten().tolist()])
say("files", sorted(name for name in os.listdir(f"{folder}/whole/checkpoint-3") if name.startswith("adapter")))

half = trainer(3, f"{folder}/half")
half.train()
rest = trainer(6, f"{folder}/half")
rest.train(resume_from_checkpoint=f"{folder}/half/checkpoint-3")
say("resumed", losses(rest))

whole.save_model(f"{folder}/final")
set_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
base = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=4, initializer_range=0.2))
again = PeftModel.from_pretrained(base, f"{folder}/final")
batch = torch.stack([row["input_ids"] for row in rows(4, 2)])
say("saved", [round(x, 4) for x in again(input_ids=batch).logits.flatten().tolist()])
