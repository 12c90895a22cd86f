"""Which adapter a call uses travels with the call: threads, checkpointed layers, concurrent tasks."""

import asyncio
import threading

import pytest
import torch

from deltatune import LoraConfig, get_peft_model
from tests.core.tiny import batch, logits, tiny
from tests.laws.examples import move

INPUTS = batch("llama")


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = get_peft_model(tiny("llama"), LoraConfig(r=4, target_modules="all-linear")).eval()
    made.add_adapter("other", LoraConfig(r=2))
    move(made), move(made, name="other")
    return made


def in_thread(function):
    result = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join(60)
    return result[0]


def test_a_block_in_one_thread_does_not_touch_another(model):
    adapted = logits(model, INPUTS)
    with model.disable_adapter():
        base = logits(model, INPUTS)
        assert torch.equal(in_thread(lambda: logits(model, INPUTS)), adapted)
        assert torch.equal(logits(model, INPUTS), base)


def test_threads_with_different_choices_never_meet(model):
    with torch.no_grad():
        adapted = logits(model, INPUTS)
        with model.disable_adapter():
            base = logits(model, INPUTS)
        rows = model(**INPUTS, adapter_names=["other", "__base__"]).logits
        start, wrong = threading.Barrier(3), []

    def work(kind):
        start.wait(30)
        with torch.no_grad():
            for _ in range(15):
                if kind == 0:
                    got, expected = logits(model, INPUTS), adapted
                elif kind == 1:
                    with model.disable_adapter():
                        got, expected = logits(model, INPUTS), base
                else:
                    got, expected = model(**INPUTS, adapter_names=["other", "__base__"]).logits, rows
                if not torch.equal(got, expected):
                    wrong.append(kind)

    threads = [threading.Thread(target=work, args=(kind,)) for kind in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == [] and model.base_model.selection.choosing == 0


def test_tasks_of_one_thread_do_not_meet(model):
    adapted = logits(model, INPUTS)

    async def disabled(entered, leave):
        with model.disable_adapter():
            entered.set()
            await leave.wait()
            return logits(model, INPUTS)

    async def main():
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(disabled(entered, leave))
        await entered.wait()
        mine = logits(model, INPUTS)
        leave.set()
        return mine, await task

    mine, theirs = asyncio.run(main())
    assert torch.equal(mine, adapted) and not torch.equal(theirs, adapted)


def gradients(model, when):
    """Gradients of a call made under a choice, with backward after the choice has ended."""
    model.train()
    model.zero_grad()
    loss = when()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_rows(model):
    return lambda: model(**INPUTS, adapter_names=["other", "default"]).loss


def by_default(model):
    return lambda: model(**INPUTS).loss


@pytest.mark.parametrize("choice", [by_rows, by_default])
def test_a_checkpointed_layer_is_recomputed_with_the_adapters_it_ran_with(model, choice):
    model.set_adapter(["default", "other"])
    expected = gradients(model, choice(model))
    model.gradient_checkpointing_enable()
    got = gradients(model, choice(model))
    assert got.keys() == expected.keys() and any("other" in name for name in got)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-6)


def test_backward_after_a_switch_or_inside_of_a_disabled_block(model):
    expected = gradients(model, by_default(model))
    model.gradient_checkpointing_enable()
    model.zero_grad()
    loss = model(**INPUTS).loss
    with model.disable_adapter():
        loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-6)
    model.zero_grad()
    loss = model(**INPUTS).loss
    model.disable_adapter_layers()
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-6)


def test_backward_from_another_thread(model):
    model.set_adapter(["default", "other"])
    expected = gradients(model, by_rows(model))
    model.gradient_checkpointing_enable()
    model.zero_grad()
    loss = by_rows(model)()
    in_thread(lambda: loss.backward())
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-6)
