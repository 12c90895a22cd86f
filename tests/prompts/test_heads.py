"""The six tasks with a prefix: loss by hand, heads that train and come back, and transformers' own Trainer."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional

import deltatune
from deltatune import PeftModel, PrefixTuningConfig, get_peft_model
from tests.prompts.models import BART, BERT, GPT, KINDS, LLAMA, T5, bare, redraw

IDS = torch.tensor([[5, 9, 7, 2, 8], [8, 30, 2, 0, 0]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
TYPES = {"token_type_ids": torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])}
CLASSES, TAGS = torch.tensor([2, 0]), torch.tensor([[0, 1, 2, 1, 0], [2, 1, 0, -100, -100]])
STARTS, ENDS = torch.tensor([1, 0]), torch.tensor([2, 1])
LABELS = {
    "SequenceClassification": {"labels": CLASSES},
    "TokenClassification": {"labels": TAGS},
    "QuestionAnswering": {"start_positions": STARTS, "end_positions": ENDS},
    "CausalLM": {"labels": TAGS},
    "Seq2SeqLM": {"labels": TAGS},
    "FeatureExtraction": {},
}
TASKS = {
    "SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS", "QuestionAnswering": "QUESTION_ANS",
    "CausalLM": "CAUSAL_LM", "Seq2SeqLM": "SEQ_2_SEQ_LM", "FeatureExtraction": "FEATURE_EXTRACTION",
}  # fmt: skip
SPAN = {name: value for name, value in BERT.items() if name != "num_labels"}
CASES = [
    ("SequenceClassification", "bert", BERT), ("SequenceClassification", "roberta", BERT),
    ("SequenceClassification", "gpt2", {**GPT, "num_labels": 3}),
    ("SequenceClassification", "t5", {**T5, "num_labels": 3}),
    ("TokenClassification", "bert", BERT), ("TokenClassification", "llama", {**LLAMA, "num_labels": 3}),
    ("QuestionAnswering", "bert", SPAN), ("QuestionAnswering", "llama", LLAMA),
    ("CausalLM", "gpt2", GPT), ("CausalLM", "llama", LLAMA),
    ("Seq2SeqLM", "t5", T5), ("Seq2SeqLM", "bart", BART), ("FeatureExtraction", "bert", BERT),
]  # fmt: skip


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100)


def loss_by_hand(task: str, output: Any) -> torch.Tensor:
    if task == "SequenceClassification":
        return cross_entropy(output.logits, CLASSES)
    if task == "QuestionAnswering":
        return (cross_entropy(output.start_logits, STARTS) + cross_entropy(output.end_logits, ENDS)) / 2
    if task == "CausalLM":
        return cross_entropy(output.logits[:, :-1], TAGS[:, 1:])
    return cross_entropy(output.logits, TAGS)


@pytest.fixture
def fresh(monkeypatch):
    def make(task: str, model_type: str, settings: dict[str, Any]) -> Any:
        auto = "AutoModel" if task == "FeatureExtraction" else f"AutoModelFor{task}"
        monkeypatch.setitem(KINDS, "task", (auto, TASKS[task], model_type, settings))
        return bare("task")

    return make


def inputs_of(task: str, model_type: str) -> dict[str, torch.Tensor]:
    return {**INPUTS, **LABELS[task], **(TYPES if model_type == "bert" else {})}


@pytest.mark.parametrize(("task", "model_type", "settings"), CASES, ids=[f"{task}-{kind}" for task, kind, _ in CASES])
def test_loss_is_that_of_the_logits_and_heads_train_and_come_back(task, model_type, settings, fresh, tmp_path):
    config = PrefixTuningConfig(task_type=TASKS[task], num_virtual_tokens=3)  # type: ignore[arg-type]
    model = get_peft_model(fresh(task, model_type, settings), config)
    redraw(model)
    assert type(model) is getattr(deltatune, f"PeftModelFor{task}")
    inputs = inputs_of(task, model_type)
    output = model.eval()(**inputs)
    loss = output.last_hidden_state[..., 0].sum() if task == "FeatureExtraction" else output.loss
    if task != "FeatureExtraction":
        torch.testing.assert_close(loss, loss_by_hand(task, output))
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    assert any("modules_to_save" in name for name in trained) == bool(model.heads)
    torch.optim.SGD(trained.values(), lr=0.1).step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh(task, model_type, settings), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])
    assert not torch.equal(loaded(**inputs)[0], output[0])


@pytest.mark.parametrize("task", TASKS)
def test_the_signature_names_the_columns_of_the_task(task):
    """transformers' Trainer reads labels off the class, and drops all columns that the signature does not name."""
    kind = getattr(deltatune, f"PeftModelFor{task}")
    named = inspect.signature(kind.forward).parameters
    assert {"input_ids", "attention_mask", "token_type_ids", *LABELS[task]} <= set(named)
    assert set(transformers.utils.generic.find_labels(kind)) == set(LABELS[task])

    class Own(kind):
        def forward(self, tokens):
            return tokens

    assert list(inspect.signature(Own.forward).parameters) == ["self", "tokens"]


@pytest.mark.parametrize(
    ("task", "model_type", "settings"),
    [("SequenceClassification", "bert", BERT), ("QuestionAnswering", "bert", SPAN)],
)
def test_the_trainer_of_transformers_trains_a_prefix(task, model_type, settings, fresh, tmp_path):
    """With gradient checkpointing, and a column that no model reads; the loss of its evaluation is the model's."""
    config = PrefixTuningConfig(task_type=TASKS[task], num_virtual_tokens=3)  # type: ignore[arg-type]
    model = get_peft_model(fresh(task, model_type, settings), config)
    redraw(model)
    inputs = inputs_of(task, model_type)
    rows = [{**{name: tensor[i] for name, tensor in inputs.items()}, "length": torch.tensor(5)} for i in (0, 1)]
    options = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, per_device_eval_batch_size=2, max_steps=3, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", learning_rate=0.05, activation_checkpointing=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, options, train_dataset=rows, eval_dataset=rows)  # type: ignore[arg-type]
    before = trainer.evaluate()["eval_loss"]
    assert before == pytest.approx(model(**inputs).loss.item(), abs=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
