"""Training at odd moments: within inference mode, from generators, with one adapter frozen, with tied weights."""

import contextvars
import threading

import pytest
import torch

from deltatune import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model, inject_adapter_in_model
from deltatune.errors import StateError
from tests.core.tiny import tiny
from tests.faults.crowd import ask, stir, two_adapters
from tests.faults.folders import INPUTS, adapted, refused

CAUSAL = {"task_type": "CAUSAL_LM"}


def two():
    return two_adapters(lambda i: LoraConfig(r=2 + i, **CAUSAL))


def trained(model, **rows):
    """Gradients of one step, by parameter."""
    model.train().zero_grad()
    model(**INPUTS, **rows).loss.backward()
    model.eval()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(one, other):
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


# inference mode ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["graft", "inject", "load", "load without numbers", "add"])
def test_an_adapter_that_was_made_in_inference_mode_can_train(way, tmp_path):
    """Its parameters were inference tensors, of which torch says at the first step that they cannot be saved."""
    adapted(1).save_pretrained(tmp_path)
    model = adapted(2) if way == "add" else tiny("llama")
    with torch.inference_mode():
        if way == "graft":
            model = get_peft_model(model, LoraConfig(r=4, **CAUSAL))
        elif way == "inject":
            model = inject_adapter_in_model(LoraConfig(r=4, **CAUSAL), model)
        elif way == "add":
            model.load_adapter(tmp_path, "second", is_trainable=True)
        else:
            numberless = way != "load"
            model = PeftModel.from_pretrained(model, tmp_path, is_trainable=True, low_cpu_mem_usage=numberless)
    if way == "add":
        model.set_adapter("second")
    assert len(trained(model)) == 12


def test_a_model_that_was_merged_in_inference_mode_can_train():
    model = adapted(1)
    with torch.inference_mode():
        merged = model.merge_and_unload()
    merged.requires_grad_(True)
    assert len(trained(merged)) == len(list(merged.parameters()))


@pytest.mark.parametrize("rows", [{}, {"adapter_names": ["a", "b"]}])
def test_training_after_answers_in_inference_mode(rows):
    """What a pass keeps for the next one is not of that mode."""
    model = two()
    model.set_requires_grad(["a", "b"])
    expected = trained(model, **rows)
    with torch.inference_mode():
        model(**INPUTS, **rows)
    again = trained(model, **rows)
    assert again.keys() == expected.keys() and all(close(again[name], expected[name]) for name in again)
    prefix = get_peft_model(tiny("llama"), PrefixTuningConfig(num_virtual_tokens=2, **CAUSAL)).eval()
    with torch.inference_mode():
        prefix(**INPUTS)
    assert trained(prefix)


# generators -------------------------------------------------------------------------------------------------------


def answers(model):
    with model.disable_adapter():
        yield ask(model)
        yield ask(model)


def elsewhere(call):
    return contextvars.copy_context().run(call)


def test_a_generator_that_is_continued_elsewhere_is_told_that_its_choice_did_not_hold():
    """As servers do that run each step of a stream in a task of its own."""
    model = two()
    adapted_answer = ask(model)
    stream = answers(model)
    for _ in range(2):
        elsewhere(lambda: next(stream))
    with refused(StateError, "another thread or task", "do not yield"):
        elsewhere(lambda: next(stream, None))
    assert torch.equal(ask(model), adapted_answer) and not model.base_model.selection.choosing


def test_generators_that_end_in_any_order_and_in_any_thread_leave_nothing_behind():
    model = two()
    plain, adapted_answer = ask(tiny("llama", num_hidden_layers=2)), ask(model)
    first, second = answers(model), answers(model)
    next(first), next(second)
    first.close()
    assert torch.equal(next(second), plain) and torch.equal(ask(model), plain)
    second.close()
    assert torch.equal(ask(model), adapted_answer)
    third = answers(model)
    next(third)
    failures = []

    def close_it():
        try:
            third.close()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=close_it)
    thread.start()
    thread.join(60)
    with model.base_model.selection.scaled(1.0):  # a call with a choice looks at what blocks have left
        assert close(ask(model), adapted_answer)
    assert failures == [] and torch.equal(ask(model), adapted_answer)


# steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_have_the_same_gradients(reentrant):
    model = adapted(1)
    expected = trained(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    again = trained(model)
    assert again.keys() == expected.keys() and all(close(again[name], expected[name]) for name in again)


def test_of_two_active_adapters_the_frozen_one_acts_and_stays():
    model = two()
    model.set_adapter(["a", "b"])
    both = ask(model)
    model.set_requires_grad("b", False)
    assert {name.split(".")[-2] for name in trained(model)} == {"a"}
    assert torch.equal(ask(model), both)


def test_an_optimizer_goes_on_with_an_adapter_whose_values_were_loaded(tmp_path):
    adapted(2).save_pretrained(tmp_path)
    model = adapted(1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    loaded = ask(model)
    assert torch.equal(loaded, ask(adapted(2)))
    trained(model)
    optimizer.step()
    assert not torch.equal(ask(model), loaded)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
@pytest.mark.filterwarnings("ignore:the merged embedding and the output layer")
def test_one_end_of_a_tied_weight_is_trained_whole(module, tmp_path):
    """Saved, merged, and the merged model saved by transformers and loaded again: the same answers."""
    transformers = pytest.importorskip("transformers")

    def tied():
        return tiny("llama", tie_word_embeddings=True)

    model = get_peft_model(tied(), LoraConfig(r=2, modules_to_save=[module], **CAUSAL)).eval()
    stir(model, "default", 0)
    expected = ask(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(ask(PeftModel.from_pretrained(tied(), tmp_path / "adapter")), expected)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert close(ask(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
