"""Threads never see each other's adapters, and what a pass uses does not change under it.

The numbers are those of the fault matrix.
"""

import threading

import pytest
import torch

from deltatune import (
    AdaptionPromptConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    XLoraConfig,
    get_peft_model,
)
from deltatune.errors import AdapterNameError, PeftWarning, StateError
from deltatune.gate import Gate
from deltatune.hotswap import hotswap_adapter
from tests.core.tiny import batch, tiny
from tests.faults.crowd import INPUTS, answers, ask, stir, together, two_adapters, wrong

CAUSAL = {"task_type": "CAUSAL_LM"}
METHODS = {
    "lora": lambda i: LoraConfig(r=2 + i, **CAUSAL),
    "dora": lambda i: LoraConfig(r=2, use_dora=True, **CAUSAL),
    "whole modules": lambda i: LoraConfig(r=2, modules_to_save=["lm_head"], **CAUSAL),
    "ia3": lambda i: IA3Config(**CAUSAL),
    "norms": lambda i: LNTuningConfig(**CAUSAL),
    "tokens": lambda i: TrainableTokensConfig(token_indices=[4, 9, 17, 30], **CAUSAL),
    "prefix": lambda i: PrefixTuningConfig(num_virtual_tokens=2 + i, **CAUSAL),
    "prompt": lambda i: PromptTuningConfig(num_virtual_tokens=2 + i, **CAUSAL),
    "gated prompt": lambda i: AdaptionPromptConfig(adapter_len=3, adapter_layers=2, **CAUSAL),
}

# 90 ------------------------------------------------------------------------------------------------------------------


def test_400_mixed_calls_of_8_threads():
    assert wrong(two_adapters(METHODS["lora"]), 400, 8) == []


@pytest.mark.parametrize("method", [method for method in METHODS if method != "lora"])
def test_mixed_calls_of_every_seam(method):
    assert wrong(two_adapters(METHODS[method]), 40, 8) == []


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_thousands_of_mixed_calls(method):
    assert wrong(two_adapters(METHODS[method], seed=7), 2000, 8) == []


def test_mixtures_of_experts_in_threads(tmp_path):
    expert = get_peft_model(tiny("llama", num_hidden_layers=2), LoraConfig(r=2, **CAUSAL))
    for name in ("one", "two"):
        stir(expert, "default", len(name))
        expert.save_pretrained(tmp_path / name)
    paths = {name: str(tmp_path / name) for name in ("one", "two")}

    def config(number):
        return XLoraConfig(adapters=paths, hidden_size=16, **CAUSAL) if number == 0 else LoraConfig(r=2, **CAUSAL)

    assert wrong(two_adapters(config), 40, 8) == []


def test_generation_in_threads():
    model = two_adapters(METHODS["prompt"])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    inputs = {key: value[1:] for key, value in INPUTS.items()}
    expected = {name: model.generate(**inputs, adapter_names=[name], **options) for name in ("a", "b", "__base__")}
    found = []

    def work(name):
        for _ in range(3):
            found.append(torch.equal(model.generate(**inputs, adapter_names=[name], **options), expected[name]))

    assert together(*[lambda name=name: work(name) for name in expected]) == [] and len(found) == 9 and all(found)


# 91 ------------------------------------------------------------------------------------------------------------------


def test_what_is_not_asked_for_comes_and_goes_under_traffic(tmp_path):
    """Another adapter is loaded, hot-swapped, renamed by a second load, deleted; a spoilt folder is refused."""
    model = two_adapters(METHODS["lora"])
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    (tmp_path / "spoilt").mkdir()
    expected, done, bad = answers(model), threading.Event(), []

    def traffic(kind, rows):
        while not done.is_set():
            if not torch.equal(ask(model, rows), expected[kind][0]):
                bad.append(kind)

    def change():
        try:
            for _ in range(6):
                model.load_adapter(tmp_path / "b", "c")
                with pytest.raises(Exception, match="spoilt"):
                    model.load_adapter(tmp_path / "spoilt", "d")
                assert torch.allclose(ask(model, ["c", "c"]), expected["other"][0], atol=1e-6)
                hotswap_adapter(model, tmp_path / "b", "c")
                model.load_adapter(tmp_path / "b", "c")
                model.add_weighted_adapter(["b", "c"], [0.5, 0.5], "sum", combination_type="linear")
                model.delete_adapter("c")
                model.delete_adapter("sum")
        finally:
            done.set()

    jobs = [lambda: traffic("alone", ["a", "a"]), lambda: traffic("mixed", ["a", "b"])]
    assert together(change, *jobs) == [] and bad == [] and list(model.peft_config) == ["a", "b"]


def test_merging_and_disabling_under_traffic():
    """A call by rows is refused while adapters are merged, as it is without threads; all others are right."""
    model = two_adapters(METHODS["lora"])
    adapted, done, bad = ask(model), threading.Event(), []
    with model.disable_adapter():
        base = ask(model)

    def close(one, other):
        return torch.allclose(one, other, rtol=1e-4, atol=1e-5)

    def traffic():
        while not done.is_set():
            got = ask(model)
            if not any(close(got, one) for one in (adapted, base)):
                bad.append("neither")
            with model.disable_adapter():
                if not close(ask(model), base):
                    bad.append("not the base")

    def change():
        try:
            for _ in range(6):
                model.merge_adapter()
                model.disable_adapter_layers()
                model.enable_adapter_layers()
                model.unmerge_adapter()
        finally:
            done.set()

    assert together(change, traffic, traffic) == [] and bad == [] and torch.equal(ask(model), adapted)


def test_a_running_pass_ends_with_the_adapter_it_began_with(tmp_path):
    """Deleting waits for the pass that uses the adapter, and for no other."""
    model = two_adapters(METHODS["lora"])
    expected, inside, go_on, found = ask(model, ["b", "b"]), threading.Event(), threading.Event(), {}

    def wait(*_):
        if threading.current_thread().name == "slow":
            inside.set()
            assert go_on.wait(20)

    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(wait)
    slow = threading.Thread(target=lambda: found.update(slow=ask(model, ["b", "b"])), name="slow")
    slow.start()
    assert inside.wait(60)
    model.add_adapter("c", LoraConfig(r=2, **CAUSAL))  # neither of these has to wait
    model.set_adapter("c")
    model.set_adapter("a")
    model.delete_adapter("c")
    gone = threading.Thread(target=lambda: found.update(gone=model.delete_adapter("b")))
    gone.start()
    gone.join(0.2)
    waited, others = gone.is_alive() and "b" in model.peft_config, [ask(model, ["a", "a"]), ask(model)]
    go_on.set()
    slow.join(60), gone.join(60)
    handle.remove()
    assert waited and torch.allclose(*others, atol=1e-6)
    assert torch.equal(found["slow"], expected) and "gone" in found and "b" not in model.peft_config
    with pytest.raises(AdapterNameError, match="'b'"):
        ask(model, ["b", "b"])


def test_a_choice_whose_adapter_is_gone_is_told():
    model = two_adapters(METHODS["lora"])
    model.set_adapter("b")
    with model.fixed_adapters():
        with pytest.warns(PeftWarning, match="'a' is active now"):
            model.delete_adapter("b")
        with pytest.raises(AdapterNameError, match="'b'"):
            ask(model)
    assert model.active_adapters == ["a"] and ask(model).isfinite().all()


def test_a_change_from_within_a_pass():
    """Alone it is made, as in PEFT; beside other passes it might wait for ever, and is refused."""
    model = two_adapters(METHODS["lora"])
    expected = answers(model)["switched"]
    handle = model.get_base_model().model.register_forward_pre_hook(lambda *_: model.set_adapter("b"))
    assert torch.equal(ask(model), expected[0]) and model.active_adapters == ["b"]
    handle.remove()

    gate, inside, done = model.base_model.selection.gate, threading.Event(), threading.Event()

    def other():
        with gate.passing(lambda: frozenset("x"), lambda: model.disable_adapter()):
            inside.set()
            assert done.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(60)
    handle = model.get_base_model().model.register_forward_pre_hook(lambda *_: model.merge_adapter())
    with pytest.raises(StateError, match="between two calls"):
        ask(model)
    handle.remove()
    done.set(), thread.join(60)
    assert torch.equal(ask(model), expected[0])


@pytest.mark.filterwarnings("ignore:.*(is left to merge|nothing is merged|is active now)")
def test_changes_of_many_threads_neither_mix_nor_hang():
    model = two_adapters(METHODS["lora"])
    before = answers(model)

    def work(number):
        for _ in range(4):
            model.add_adapter(f"n{number}", LoraConfig(r=2, **CAUSAL))
            model.set_adapter(["a", f"n{number}"])
            ask(model)
            model.merge_adapter(["b"])
            model.unmerge_adapter()
            model.delete_adapter(f"n{number}")

    def tolerant(number):
        try:
            work(number)
        except StateError as error:  # merged by another thread just now
            assert "merged" in str(error)

    assert together(*[lambda number=number: tolerant(number) for number in range(6)]) == []
    model.unmerge_adapter()
    for name in [name for name in model.peft_config if name not in "ab"]:
        model.delete_adapter(name)
    model.set_adapter("a")
    for kind, tensors in answers(model).items():
        assert all(torch.equal(one, other) for one, other in zip(tensors, before[kind]))


def test_a_gate_lets_a_pass_within_a_pass_through_while_a_change_waits_for_the_outer_one():
    gate, inside, go_on, order = Gate(), threading.Event(), threading.Event(), []

    def uses():
        return frozenset("a")

    def passing():
        with gate.passing(uses, lambda: gate.passing(uses, lambda: _noted(order, "inner"))):
            inside.set()
            assert go_on.wait(20)
            with gate.passing(uses, lambda: _noted(order, "later")):
                order.append("pass")

    def change():
        assert inside.wait(60)
        threading.Timer(0.05, go_on.set).start()
        with gate.changing(["a"]), gate.changing():
            order.append("change")

    assert together(passing, change) == [] and order == ["inner", "later", "pass", "change"]


class _noted:
    def __init__(self, order, word):
        order.append(word)

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        return None


# training ------------------------------------------------------------------------------------------------------------


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("late", [False, True])
def test_threads_that_train_different_adapters_get_their_own_gradients(reentrant, late):
    """Backward runs outside of the choice, in another thread; checkpointing may have been switched on by others."""
    rows = {"a": ["a", "__base__"], "b": ["b", "b"]}

    def made():
        model = two_adapters(METHODS["lora"]).train()
        model.set_adapter(["a", "b"])
        return model

    def step(model, name):
        loss = model(**batch("llama"), adapter_names=rows[name], use_cache=False).loss
        thread = threading.Thread(target=loss.backward)
        thread.start(), thread.join(60)

    expected = {}
    for name in rows:
        model = made()
        step(model, name)
        expected |= gradients(model)
    model = made()
    if reentrant is not None:
        who = model.get_base_model() if late else model
        who.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.get_base_model().enable_input_require_grads()
    assert together(*[lambda name=name: step(model, name) for name in rows]) == []
    got = gradients(model)
    got = {name: got[name] for name in got if name in expected}
    assert got.keys() == expected.keys() and len(got) == 16
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_of_a_layer_that_has_been_merged_meanwhile_is_refused(reentrant):
    model = two_adapters(METHODS["lora"]).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.get_base_model().enable_input_require_grads()
    loss = model(**batch("llama"), use_cache=False).loss
    model.merge_adapter()
    with pytest.raises(StateError, match=r"merged.*unmerge_adapter"):
        loss.backward()
    model.unmerge_adapter()
    model(**batch("llama"), use_cache=False).loss.backward()
    assert isinstance(model, PeftModel) and len(gradients(model)) == 8
