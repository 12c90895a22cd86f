"""transformers' Trainer with a model under `chunk_loss`."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from deltatune import LoraConfig, chunk_loss, get_peft_model
from deltatune.kernels import linear_cross_entropy as kernel
from tests.core.tiny import batch, tiny


def trained(folder, chunked, **options):
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama"), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"]))
    stage = chunk_loss(model) if chunked else None
    rows = batch("llama", 24)
    data = [{name: values[index] for name, values in rows.items()} for index in range(24)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        logging_steps=1, report_to=[], use_cpu=True, learning_rate=1e-2, save_strategy="no", **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:8])
    trainer.train()
    predicted = trainer.predict(data[:8])
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, predicted, stage


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}, {"bf16": True}], ids=str)
def test_the_same_training(options, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", 1)
    own, expected, _ = trained(tmp_path, False, **options)
    found, predicted, stage = trained(tmp_path, True, **options)
    tolerance = 2e-2 if options.get("bf16") else 1e-4
    assert len(own) == 3 and found == pytest.approx(own, rel=tolerance)
    assert predicted.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=tolerance)
    assert predicted.predictions == pytest.approx(expected.predictions, rel=tolerance, abs=tolerance * 10)
    # smoothed, the Trainer keeps the labels to itself
    assert stage.whole == ("no pass with labels has run" if "label_smoothing_factor" in options else None)
