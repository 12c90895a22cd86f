"""On and off: several prefixes, prefix and LoRA, disabling, detaching."""

from __future__ import annotations

import pytest
import torch

from deltatune import LoraConfig, PrefixTuningConfig
from deltatune.errors import AdapterNameError, StateError
from deltatune.prompts import attention
from deltatune.prompts.key_values import Prefix
from deltatune.prompts.prefix import PrefixEncoder
from deltatune.selection import Selection
from tests.prompts.models import KINDS, activate_together, bare, batch, gradients, prefixed


def state(model: torch.nn.Module) -> list[dict]:
    return [dict(vars(module)) for module in model.modules()]


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bert", "bart", "hybrid", "recurrent", "albert"])
def test_disabled_is_the_base_bit_for_bit(name):
    model, inputs = prefixed(name, sites="all"), batch(name)
    with torch.no_grad():
        expected = bare(name)(**inputs).logits
        assert not torch.equal(model(**inputs).logits, expected)
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("layout", ["native", "peft"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_detached_leaves_the_model_as_it_was(name, layout):
    model, inputs = bare(name), batch(name)
    model.activation_checkpointing_enable()
    before = state(model)
    config = PrefixTuningConfig(task_type=KINDS[name][1], num_virtual_tokens=3, layout=layout)
    prefix = Prefix.attach(model, config, "a", Selection(active=("a",)), PrefixEncoder)
    model.train()(**inputs).logits.sum().backward()
    prefix.detach()
    model.eval()
    assert state(model) == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, bare(name)(**inputs).logits)


def test_one_name_is_one_prefix():
    model, selection = bare("llama"), Selection()
    Prefix.attach(model, PrefixTuningConfig(num_virtual_tokens=3), "a", selection, PrefixEncoder)
    before = state(model)
    with pytest.raises(AdapterNameError, match="'a'"):
        Prefix.attach(model, PrefixTuningConfig(num_virtual_tokens=3), "a", selection, PrefixEncoder)
    assert state(model) == before


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_two_prefixes_are_the_prefix_of_both_their_rows(name):
    model, inputs = prefixed(name), batch(name)
    model.add_adapter("b", PrefixTuningConfig(task_type=KINDS[name][1], num_virtual_tokens=2))
    activate_together(model, ["default", "b"])
    rows = [model.prompt_encoder[adapter].embedding.weight for adapter in ("default", "b")]
    joined = prefixed(name, num_virtual_tokens=6)
    with torch.no_grad():
        joined.prompt_encoder["default"].embedding.weight.copy_(torch.cat(rows))
        torch.testing.assert_close(model(**inputs).logits, joined(**inputs).logits, atol=1e-6, rtol=1e-5)
        model.delete_adapter("b")
        assert torch.equal(model(**inputs).logits, prefixed(name)(**inputs).logits)


def test_a_prefix_that_moves_positions_stands_alone():
    model = prefixed("llama", layout="peft")
    model.add_adapter("b", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    model.set_adapter(["default", "b"])
    with pytest.raises(StateError, match="layout='peft'"):
        model(**batch("llama"))
    model.set_adapter("b")
    assert model(**batch("llama")).logits.isfinite().all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_prefix_and_lora_work_together(checkpointing):
    """The same as a prefix on a base whose weights hold the LoRA already, gradients of the prefix included."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    model, inputs = prefixed("llama"), batch("llama")
    model.add_adapter("low", lora)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_B" in path:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.3)
    adapted = bare("llama")
    for path, layer in model.get_base_model().named_modules():
        if path.endswith(("q_proj", "v_proj")):
            adapter = layer.adapters["low"]
            delta = adapter.scaling * adapter.lora_B.weight @ adapter.lora_A.weight
            adapted.get_submodule(path).weight.data += delta.detach()
    expected = prefixed("llama", adapted).train()
    model.set_adapter(["default", "low"])
    if checkpointing:
        model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(model.train(), inputs), gradients(expected, inputs), atol=1e-6, rtol=1e-4)
    assert all(p.grad is not None for path, p in model.named_parameters() if "lora_" in path)


def test_a_probe_in_one_thread_does_not_switch_off_prefixes_in_another():
    import threading

    class Silent(attention.Recorder):
        def record(self, *_):
            raise AssertionError("a call of another thread")

    model, inputs, found = prefixed("llama"), batch("llama"), []
    with torch.no_grad():
        expected = model(**inputs).logits
        with Silent():
            thread = threading.Thread(target=lambda: found.append(model(**inputs).logits.detach()))
            thread.start()
            thread.join()
    assert torch.equal(found[0], expected)


def test_threads_with_different_choices_do_not_meet():
    from concurrent.futures import ThreadPoolExecutor

    model, inputs = prefixed("llama", prefix_projection=True), batch("llama")

    def run(disabled: bool) -> torch.Tensor:
        with torch.no_grad():
            if not disabled:
                return model(**inputs).logits
            with model.disable_adapter():
                return model(**inputs).logits

    expected = [run(False), run(True)]
    with ThreadPoolExecutor(4) as pool:
        for index, found in enumerate(pool.map(run, [False, True] * 20)):
            assert torch.equal(found, expected[index % 2])
