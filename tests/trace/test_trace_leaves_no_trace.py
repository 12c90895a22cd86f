"""A traced model is the model it was."""

import pytest
import torch

from deltatune.errors import DataError, StateError
from deltatune.prompts import attention
from deltatune.trace import example, trace


def state_of(model):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "trainable": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(vars(module)[kind]) for module in model.modules() for kind in hooks],
        "random": torch.get_rng_state(),
        "observers": list(attention.observers),
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for kind, value in before.items():
        if isinstance(value, dict):
            assert value.keys() == after[kind].keys()
            assert all(torch.equal(value[name], after[kind][name]) for name in value)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, after[kind])
        else:
            assert value == after[kind], kind


CASES = [("prefix_tuning", "t5"), ("prefix_tuning", "gpt2"), ("prefix_tuning", "bert"), ("lora", "t5"), ("oft", "gpt2")]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method, architecture", CASES)
def test_parameters_hooks_modes_and_random_state_are_as_before(method, architecture, training):
    model, batch = example(method, architecture)
    model.train(training)
    before, inputs = state_of(model), {key: value.clone() for key, value in batch.items()}
    trace(model, batch)
    assert_same(before, state_of(model))
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(inputs[key], batch[key]) for key in inputs)


def test_gradients_that_are_being_accumulated_stay():
    model, batch = example("lora", "gpt2")
    model(**batch).loss.backward()
    before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    trace(model, batch)
    for parameter, (grad, value) in zip(model.parameters(), before):
        assert parameter.grad is grad and (grad is None or torch.equal(grad, value))


def test_running_statistics_stay():
    from deltatune import LoraConfig, get_peft_model

    layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    model = get_peft_model(layers, LoraConfig(target_modules=["0"], r=2)).train()
    batch = {"input": torch.randn(8, 4)}
    before = state_of(model)
    report = trace(model, batch, loss=lambda output: output.square().mean())
    assert_same(before, state_of(model))
    assert report.task.training and report.layers[0].calls == 1


def test_the_graph_of_the_pass_is_let_go():
    model, batch = example("prefix_tuning", "gpt2")
    trace(model, batch)
    assert model.prefixes["default"].stage.latest is None


def test_tracing_twice_gives_the_same_report():
    model, batch = example("prefix_tuning", "t5")
    assert trace(model, batch) == trace(model, batch)


@pytest.mark.parametrize("method", ["prefix_tuning", "lora"])
def test_a_batch_that_fails_leaves_the_model_as_it_was(method):
    model, batch = example(method, "gpt2")
    before = state_of(model)
    with pytest.raises(IndexError):
        trace(model, {**batch, "input_ids": batch["input_ids"] + 10_000})
    assert_same(before, state_of(model))


def test_other_threads_models_are_not_listed():
    model, batch = example("prefix_tuning", "gpt2")
    other, _ = example("prefix_tuning", "gpt2", seed=1)
    report = trace(model, batch, loss=lambda output: (other(**batch), output.loss)[1])
    assert len(report.calls) == 4
    model.get_base_model().transformer.register_forward_pre_hook(lambda *_: other(**batch) and None)
    assert len(trace(model, batch).calls) == 4


def test_what_cannot_be_traced_is_told():
    model, batch = example("lora", "gpt2")
    with pytest.raises(StateError, match="not adapted; trace what get_peft_model"):
        trace(model.get_base_model(), batch)
    with pytest.raises(DataError, match="the batch is empty"):
        trace(model, {})
    with pytest.raises(DataError, match="the batch is list"):
        trace(model, [1, 2])
    model.disable_adapter_layers()
    with pytest.raises(StateError, match="no adapter is active"):
        trace(model, batch)
    model.enable_adapter_layers()
    model.merge_adapter()
    with pytest.raises(StateError, match="unmerge_adapter"):
        trace(model, batch)


def test_a_loss_that_is_not_finite_is_told():
    model, batch = example("lora", "gpt2")
    report = trace(model, batch, loss=lambda output: output.loss * float("nan"))
    assert report.loss.value is None and "not finite" in report.loss.note
    assert report.gradient.norm is None and report.gradient.live == 0 and report.dead
