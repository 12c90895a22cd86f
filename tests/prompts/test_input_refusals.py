"""What cannot work with a prompt is refused by name, before anything changes."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from deltatune import (
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from deltatune.errors import ConfigError, DataError, MismatchError, StateError, TargetError
from tests.prompts.inputs import METHODS, batch, model_of, prompted


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (PromptTuningConfig, {"prompt_tuning_init": "ZERO"}, "one of TEXT, SAMPLE_VOCAB, RANDOM"),
        (PromptTuningConfig, {"prompt_tuning_init": "TEXT"}, "prompt_tuning_init_text"),
        (PromptTuningConfig, {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"}, "tokenizer_name_or_path"),
        (PromptTuningConfig, {"tokenizer_kwargs": {"a": 1}}, "tokenizer_kwargs"),
        (PromptTuningConfig, {"num_virtual_tokens": 0}, "num_virtual_tokens"),
        (PromptEncoderConfig, {"encoder_reparameterization_type": "GRU"}, "one of MLP, LSTM"),
        (PromptEncoderConfig, {"encoder_dropout": 1.5}, "probability"),
        (MultitaskPromptTuningConfig, {"prompt_tuning_init": "SAMPLE_VOCAB"}, "AVERAGE_SOURCE_TASKS"),
        (MultitaskPromptTuningConfig, {"prompt_tuning_init": "EXACT_SOURCE_TASK"}, "state_dict_path"),
        (MultitaskPromptTuningConfig, {"num_tasks": 0}, "num_tasks"),
        (CPTConfig, {"task_type": "SEQ_CLS"}, "CAUSAL_LM"),
        (CPTConfig, {"task_type": "CAUSAL_LM", "cpt_token_ids": [1, 2], "cpt_mask": [1]}, r"\[2, 1, 2\]"),
    ],
)
def test_a_wrong_setting_is_named(kind, options, words):
    with pytest.raises(ConfigError, match=words):
        kind(**options)


class Images(nn.Module):
    def forward(self, x):
        return x


def test_models_without_embedded_tokens_are_refused_with_what_works():
    config = PromptTuningConfig(num_virtual_tokens=2)
    vision = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
        )
    )
    for model, words in ((vision, "pixel_values.*PrefixTuningConfig"), (Images(), "transformers")):
        before = dict(vars(model))
        with pytest.raises(TargetError, match=words):
            get_peft_model(model, config)
        assert dict(vars(model)) == before
    with pytest.raises(ConfigError, match="num_virtual_tokens"):
        get_peft_model(model_of("gpt2"), PromptTuningConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="token_dim=8"):
        get_peft_model(model_of("gpt2"), PromptTuningConfig(num_virtual_tokens=2, token_dim=8))
    with pytest.raises(DataError, match="vocabulary"):
        get_peft_model(model_of("gpt2"), CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[500]))


@pytest.mark.parametrize("name", ["gpt2", "bert", "bart"])
def test_too_long_a_sequence_is_named(name):
    model = prompted(name)
    ids = torch.full((1, 61), 5)
    given = {"decoder_input_ids": ids[:, :2]} if name == "bart" else {}
    with pytest.raises(DataError, match="64 positions, but tokens and virtual tokens are 65"):
        model(input_ids=ids, **given)
    assert model(input_ids=ids[:, 1:], **given).logits.isfinite().all()


def test_arguments_that_cannot_be_lengthened_are_named():
    model, inputs = prompted("llama"), batch("llama")
    ids = inputs["input_ids"]
    with pytest.raises(StateError, match="attention_mask given as dict"):
        model(input_ids=ids, attention_mask={"full_attention": inputs["attention_mask"]})
    with pytest.raises(StateError, match="of shape"):
        prompted("bert")(input_ids=ids, attention_mask=torch.ones(2, 1, 8, 8))
    with pytest.raises(StateError, match="begin anew"):
        model(input_ids=ids[:1], position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]))
    with pytest.raises(StateError, match="bbox"):
        model(input_ids=ids, bbox=torch.zeros(2, 8, 4))
    with pytest.raises(StateError, match="encoder_outputs"):
        prompted("t5")(encoder_outputs=(torch.zeros(2, 8, 32),), decoder_input_ids=ids)
    assert model(**inputs).logits.shape == (2, 8, 64)  # a refused call leaves nothing behind


@pytest.mark.parametrize(
    ("tasks", "words"), [(None, "pass task_ids"), ([0, 5], r"holds \[5\]"), ([0, 1, 2], "one integer per row")]
)
def test_task_ids_are_checked(tasks, words):
    model = prompted("llama", "multitask", num_tasks=3)
    given = {} if tasks is None else {"task_ids": torch.tensor(tasks)}
    with pytest.raises(DataError, match=words):
        model(**batch("llama"), **given)


@pytest.mark.parametrize("method", METHODS)
def test_files_of_another_size_are_refused_and_change_nothing(method, tmp_path):
    model = prompted("llama", method)
    before = {name: tensor.clone() for name, tensor in model.prompt_encoder.state_dict().items()}
    prompt = model.prompts["default"]
    tensors = prompt.file_tensors()
    for wrong in ({**tensors, "surplus": torch.zeros(1)}, {}, {k: v[:1] for k, v in tensors.items()}):
        with pytest.raises(MismatchError):
            prompt.load_file_tensors(wrong)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.prompt_encoder.state_dict().items())
    model.save_pretrained(tmp_path)
    with pytest.raises((ConfigError, MismatchError)):
        PeftModel.from_pretrained(model_of("albert"), tmp_path, allow_base_mismatch=True)


@pytest.mark.parametrize("method", METHODS)
def test_files_hold_all_that_training_needs(method, tmp_path):
    model = prompted("llama", method)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model_of("llama"), tmp_path, is_trainable=True)
    expected = dict(model.prompt_encoder.named_parameters())
    found = dict(again.prompt_encoder.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in found.items())
    assert {n for n, p in found.items() if p.requires_grad} == {n for n, p in expected.items() if p.requires_grad}
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch("llama")).logits, model(**batch("llama")).logits)
