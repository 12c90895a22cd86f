"""The article's two examples, on T5-base built from its config: names, dict and printed numbers."""

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from deltatune import LoraConfig, PrefixTuningConfig, TaskType, get_peft_config, get_peft_model
from deltatune.errors import PeftWarning


@pytest.fixture
def t5_base():
    config = T5Config(
        vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, feed_forward_proj="relu"
    )
    with torch.device("meta"):
        return T5ForConditionalGeneration(config)


def test_lora_of_the_article(t5_base, capsys):
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "inference_mode": False,
        "r": 8,
        "target_modules": ["q", "v"],
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "fan_in_fan_out": False,
        "enable_lora": None,
        "bias": "none",
    }
    with pytest.warns(PeftWarning, match="enable_lora"):
        peft_config = get_peft_config(config)
    model = get_peft_model(t5_base, peft_config)
    model.print_trainable_parameters()
    assert capsys.readouterr().out == ("trainable params: 884,736 || all params: 223,788,288 || trainable%: 0.3953\n")
    assert 884_736 == 8 * (768 + 768) * 2 * (12 + 12 + 12)  # q and v of encoder, decoder and cross-attention


def test_the_same_with_usual_targets(t5_base):
    model = get_peft_model(t5_base, LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, r=8))
    assert model.get_nb_trainable_parameters() == (884_736, 223_788_288)


def test_prefix_tuning_of_the_article(t5_base, capsys):
    peft_config = PrefixTuningConfig(task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, num_virtual_tokens=20)
    model = get_peft_model(t5_base, peft_config)
    model.print_trainable_parameters()
    assert "trainable params: 368,640 || " in capsys.readouterr().out
    assert 368_640 == 20 * 12 * 2 * 768
