"""TRL's SFTTrainer with `peft_config`: a model of random weights, a small tokenizer built here."""

import json
import tempfile

from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer


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


def trainer(model, path, **options):
    arguments = SFTConfig(
        output_dir=f"{folder}/{path}", max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, save_steps=3, max_length=16, seed=5, **options,
    )  # fmt: skip
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": sentences(32)}),
        eval_dataset=Dataset.from_dict({"text": sentences(8)}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


first = trainer(f"{folder}/base", "out", gradient_checkpointing=True)
say("trainable", first.model.get_nb_trainable_parameters())
first.train()
say("losses", [entry["loss"] for entry in first.state.log_history if "loss" in entry])
say("evaluated", first.evaluate()["eval_loss"])
first.save_model(f"{folder}/adapter")
again = AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapter")
batch = tokenizer()(sentences(2), return_tensors="pt")
inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
say("saved", [round(x, 4) for x in again(**inputs).logits[:, -1, :4].flatten().tolist()])

resumed = trainer(AutoModelForCausalLM.from_pretrained(f"{folder}/base"), "resumed", gradient_checkpointing=False)
resumed.train(resume_from_checkpoint=f"{folder}/out/checkpoint-3")
say("resumed", [entry["loss"] for entry in resumed.state.log_history if "loss" in entry])
