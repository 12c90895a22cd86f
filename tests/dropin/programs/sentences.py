"""sentence-transformers: an adapter on an encoder of random weights, trained, saved, loaded again."""

import json
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.models import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed


def say(name, value):
    print("=", name, json.dumps(value))


TEXT = "a an the cat dog bird sees hears likes small big red blue today now not and then"
WORDS = TEXT.split()
vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
made.pre_tokenizer = pre_tokenizers.Whitespace()
marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
texts = [" ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(1, 6)) for i in range(24)]

folder = tempfile.mkdtemp()
set_seed(0)
sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
BertModel(BertConfig(**sizes, num_attention_heads=4, initializer_range=0.2)).save_pretrained(f"{folder}/base")
PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=16, **marks).save_pretrained(f"{folder}/base")


def encoder():
    inner = Transformer(f"{folder}/base", max_seq_length=16)
    return SentenceTransformer(modules=[inner, Pooling(32)], device="cpu")


def rounded(vectors):
    return [round(float(x), 4) for x in torch.as_tensor(vectors)[:, :3].flatten()]


model = encoder()
say("bare", rounded(model.encode(texts[:2])))
set_seed(1)
model.add_adapter(
    LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=4, lora_alpha=8, target_modules=["query", "value"])
)
say("trainable", sum(p.numel() for p in model.parameters() if p.requires_grad))
say("active", model.active_adapters())
arguments = SentenceTransformerTrainingArguments(
    output_dir=f"{folder}/out", max_steps=4, per_device_train_batch_size=6, learning_rate=1e-2, logging_steps=1,
    report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", seed=3,
)  # fmt: skip
data = Dataset.from_dict({"anchor": texts, "positive": texts[::-1]})
trainer = SentenceTransformerTrainer(
    model=model, args=arguments, train_dataset=data, loss=MultipleNegativesRankingLoss(model)
)
trainer.train()
say("losses", [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
say("trained", rounded(model.encode(texts[:2])))
say("state", sorted(model.get_adapter_state_dict())[:2])
model.disable_adapters()
say("off", rounded(model.encode(texts[:2])))
model.enable_adapters()
model.save_pretrained(f"{folder}/saved")
say("again", rounded(SentenceTransformer(f"{folder}/saved", device="cpu").encode(texts[:2])))
model.delete_adapter("default")
say("deleted", rounded(model.encode(texts[:2])))
