"""Gradients: every scalar of a prefix gets one, with checkpointing and without, whatever happens in between."""

from __future__ import annotations

import threading

import pytest
import torch

from deltatune.errors import StateError
from tests.prompts.models import bare, batch, gradients, prefixed


def close(found, expected, tolerance=1e-6):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= tolerance * max(1.0, other.abs().max().item())


@pytest.mark.parametrize("sites", ["default", "all"])
@pytest.mark.parametrize("name", ["t5", "t5-deep", "bart", "llama"])
def test_every_scalar_of_the_prefix_gets_a_gradient(name, sites):
    (gradient,) = gradients(prefixed(name, sites=sites).train(), batch(name))
    assert (gradient != 0).all()


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize(
    ("name", "sites"), [("gpt2", "all"), ("llama", "all"), ("bert", "all"), ("t5", "default"), ("t5", "all")]
)
def test_checkpointing_keeps_the_gradients(name, sites, projection):
    settings = {"sites": sites, "prefix_projection": projection}
    expected = gradients(prefixed(name, **settings).double().train(), batch(name))
    model = prefixed(name, **settings).double().train()  # other kernels run, and round otherwise, with checkpointing
    model.gradient_checkpointing_enable()
    close(gradients(model, batch(name)), expected)


def test_checkpointing_that_is_enabled_on_the_bare_model_keeps_the_gradients():
    expected = gradients(prefixed("llama").train(), batch("llama"))
    model = prefixed("llama").train()
    model.get_base_model().activation_checkpointing_enable()
    close(gradients(model, batch("llama")), expected)


@pytest.mark.parametrize("run", ["here", "in a thread"])
@pytest.mark.parametrize("projection", [False, True])
def test_a_recomputed_layer_sees_the_prefix_of_its_own_forward_pass(projection, run):
    """By the time of the backward pass another adapter is active, all are disabled, or another thread runs."""
    model = prefixed("llama", prefix_projection=projection).train()
    expected = gradients(model, batch("llama"))
    model.add_adapter("other", model.peft_config["default"].__class__(num_virtual_tokens=2))
    model.set_adapter("default")
    model.get_base_model().activation_checkpointing_enable()
    model.zero_grad()
    loss = model(**batch("llama")).logits.square().mean()

    def backward():
        model.base_model.selection.active = ("other",)
        with model.disable_adapter():
            loss.backward()

    if run == "here":
        backward()
    else:
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    close([p.grad for p in model.prompt_encoder["default"].parameters()], expected)
    assert all(p.grad is None for p in model.prompt_encoder["other"].parameters())


def test_a_pass_without_adapters_is_recomputed_without_them():
    model = prefixed("llama").train()
    layer = model.get_base_model().model.layers[1]
    layer.mlp.up_proj.weight.requires_grad_(True)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable()
        model.zero_grad()
        with model.disable_adapter():
            loss = model(**batch("llama")).logits.square().mean()
        loss.backward()
        found.append(layer.mlp.up_proj.weight.grad.clone())
    close(found[:1], found[1:])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("projection", [False, True])
def test_two_forward_passes_and_one_backward_pass_add_up(projection, checkpointing):
    model = prefixed("t5", prefix_projection=projection).double().train()
    first, second = gradients(model, batch("t5")), gradients(model, batch("t5", seed=2))
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.zero_grad()
    losses = [model(**batch("t5", seed=seed)).logits.square().mean() for seed in (1, 2)]
    sum(losses).backward()
    close([p.grad for p in model.prompt_encoder.parameters()], [a + b for a, b in zip(first, second)])


def test_reentrant_checkpointing_works_for_a_plain_prefix_and_is_refused_with_projection():
    expected = gradients(prefixed("llama").train(), batch("llama"))
    for projection in (False, True):
        model = prefixed("llama", prefix_projection=projection).train()
        base = model.get_base_model()
        base.activation_checkpointing_enable({"use_reentrant": True})
        if projection:
            with pytest.raises(StateError, match="use_reentrant"):
                model(**batch("llama"))
        else:
            close(gradients(model, batch("llama")), expected)


def test_the_backward_pass_of_a_decoder_prefix_stays_out_of_the_encoder():
    model = prefixed("t5").train()
    output = model(**batch("t5"))
    assert not output.encoder_last_hidden_state.requires_grad


def test_the_projection_runs_once_per_training_pass_and_once_for_all_of_generation():
    model = prefixed("t5", prefix_projection=True)
    calls = []
    model.prompt_encoder["default"].transform.register_forward_hook(lambda *_: calls.append(1))
    inputs = batch("t5")
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    gradients(model.train(), inputs)
    assert len(calls) == 1
    model.eval().generate(**prompt, max_new_tokens=4)
    model.generate(**prompt, max_new_tokens=4)
    assert len(calls) == 2


def test_a_kept_projection_is_forgotten_when_the_parameters_change():
    model = prefixed("llama", prefix_projection=True)
    inputs, encoder = batch("llama"), model.prompt_encoder["default"]
    with torch.no_grad():
        first = model(**inputs).logits
        encoder.transform[2].bias.add_(1.0)
        second = model(**inputs).logits
        assert not torch.equal(first, second)
        encoder.transform[2].bias = torch.nn.Parameter(encoder.transform[2].bias - 1.0)
        torch.testing.assert_close(model(**inputs).logits, first)
    gradients(model.train(), inputs)
    encoder.transform[2].bias.data.add_(1.0)  # which counts no version; a training step lies in between
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs).logits, second)


def test_an_interrupted_pass_leaves_nothing_behind():
    model, inputs = prefixed("llama"), batch("llama")
    with torch.no_grad():
        expected = model(**inputs).logits
        handle = model.get_base_model().model.layers[1].register_forward_hook(_interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        handle.remove()
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, bare("llama")(**inputs).logits)
        assert torch.equal(model(**inputs).logits, expected)


def _interrupt(*_):
    raise KeyboardInterrupt


def test_the_base_in_half_precision_trains_a_prefix_in_full_precision():
    model = prefixed("llama", bare("llama").to(torch.bfloat16)).train()
    (gradient,) = gradients(model, batch("llama"))
    assert gradient.dtype == torch.float32 and (gradient != 0).any()


def test_a_compiled_training_step_is_one_graph_and_the_same():
    model = prefixed("t5", prefix_projection=True).train()
    expected = gradients(model, batch("t5"))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    model.zero_grad()
    compiled(**batch("t5")).logits.square().mean().backward()
    close([parameter.grad for parameter in model.prompt_encoder.parameters()], expected)
