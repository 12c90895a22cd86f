"""TRL's GRPOTrainer with `peft_config`: it generates, scores, and trains the adapter against the base."""

import json
import tempfile

from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import GRPOConfig, GRPOTrainer


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


def words(completions, **kwargs):
    """The reward: how many of the words are different."""
    return [float(len(set(text.split()))) for text in completions]


def trainer(model, path, **options):
    arguments = GRPOConfig(
        output_dir=f"{folder}/{path}", max_steps=3, per_device_train_batch_size=4, num_generations=4,
        learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
        save_strategy="no", seed=5, max_completion_length=6, beta=0.1, temperature=1.0,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": sentences(16)})
    return GRPOTrainer(
        model=model, reward_funcs=words, args=arguments, train_dataset=data, processing_class=tokenizer(), **options
    )


first = trainer(
    f"{folder}/base", "first", peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
)
first.train()
say("losses", [entry["loss"] for entry in first.state.log_history if "loss" in entry])
say("rewards", [entry["reward"] for entry in first.state.log_history if "reward" in entry])
say("kl", [entry["kl"] for entry in first.state.log_history if "kl" in entry])
first.save_model(f"{folder}/adapter")

base = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
second = trainer(PeftModel.from_pretrained(base, f"{folder}/adapter", is_trainable=True), "second")
second.train()
say("losses from there", [entry["loss"] for entry in second.state.log_history if "loss" in entry])
