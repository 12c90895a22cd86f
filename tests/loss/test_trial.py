"""Which models `chunk_loss` serves is found out by running them."""

import pytest
import torch
import transformers
from torch import nn

from deltatune import LoraConfig, chunk_loss, get_peft_model
from deltatune.loss.trial import why_not
from tests.core.tiny import tiny


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_models_that_it_serves(name):
    model = tiny(name).train()
    state = torch.get_rng_state()
    assert why_not(model) is None
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_half_precision_and_adapters():
    model = get_peft_model(tiny("llama").bfloat16(), LoraConfig(target_modules=["q_proj"]))
    assert why_not(model) is None


def test_what_was_put_on_stays():
    model = tiny("llama")
    stage = chunk_loss(model)
    assert why_not(model) is None
    assert chunk_loss(model) is stage and stage.enabled


def test_a_loss_that_needs_whole_logits():
    model = tiny("llama")
    model.loss_function = lambda logits, labels, **options: logits.logsumexp(-1).mean()
    assert why_not(model) == "logsumexp needs them"


def test_a_head_that_the_model_does_not_call():
    class Own(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **options):
            logits = self.model(input_ids).last_hidden_state @ self.lm_head.weight.T
            return transformers.modeling_outputs.CausalLMOutput(self.loss_function(logits, labels, 61), logits)

    assert why_not(Own(tiny("llama").config)) == "the model did not call its head"


def test_a_loss_that_would_be_another(monkeypatch):
    from deltatune.loss.head import Head

    right = Head.loss
    monkeypatch.setattr(Head, "loss", lambda *args: right(*args) * 1.01)
    assert "in chunks, and" in (why_not(tiny("llama")) or "")


def test_models_of_other_kinds():
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = transformers.ViTForImageClassification(config)
    assert "has no head over a vocabulary" in (why_not(model) or "")
    assert "has no head" in (why_not(nn.Linear(2, 2)) or "")
