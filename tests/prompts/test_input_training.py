"""Prompts in training and beside other adapters: checkpoints, graphs, precisions, copies, LoRA, prefixes, rows."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch

from deltatune import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from deltatune.errors import StateError
from tests.prompts.inputs import METHODS, batch, by_hand, model_of, prompted, task
from tests.prompts.models import activate_together

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def labelled(name: str) -> dict[str, torch.Tensor]:
    inputs = batch(name)
    if task(name) == "SEQ_CLS":
        return {**inputs, "labels": torch.tensor([0, 2])}
    if task(name) == "SEQ_2_SEQ_LM":
        return {**inputs, "labels": inputs.pop("decoder_input_ids")}
    return {**inputs, "labels": torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)}


def gradients(model, inputs) -> list[torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return [p.grad.clone() for p in model.prompt_encoder.parameters() if p.requires_grad]


def close(found, expected, tolerance=1e-5):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= tolerance * max(1.0, other.abs().max().item())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_checkpointing_keeps_the_gradients(name, reentrant):
    expected = gradients(prompted(name, "mlp").double().train(), labelled(name))
    assert all((part != 0).any() for part in expected)
    model = prompted(name, "mlp").double().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    close(gradients(model, labelled(name)), expected)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama", "prompt"),
        pytest.param("llama", "cpt", marks=SLOW),
        pytest.param("bert", "mlp", marks=SLOW),
        pytest.param("t5", "multitask", marks=SLOW),
    ],
)
def test_a_compiled_training_step_is_one_graph_and_the_same(name, method):
    torch._dynamo.reset()
    model = prompted(name, method).train()
    expected = gradients(model, labelled(name))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    model.zero_grad()
    compiled(**labelled(name)).loss.backward()
    close([p.grad for p in model.prompt_encoder.parameters() if p.requires_grad], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_prompt_of_a_half_precision_base_is_float32(dtype):
    model = prompted("llama", base=model_of("llama").to(dtype))
    (parameter,) = model.prompt_encoder.parameters()
    assert parameter.dtype == torch.float32
    assert model(**batch("llama")).logits.dtype == dtype
    (gradient,) = gradients(model.train(), labelled("llama"))
    assert gradient.dtype == torch.float32 and gradient.isfinite().all()


def test_autocast_computes_the_same_roughly():
    model = prompted("llama", "mlp")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(**batch("llama")).logits
    with torch.no_grad():
        assert (found - model(**batch("llama")).logits).abs().max() < 0.3


@pytest.mark.parametrize("method", METHODS)
def test_copies_are_equal_and_independent(method):
    model, inputs = prompted("llama", method), batch("llama")
    with torch.no_grad():
        expected = model(**inputs).logits
        stored = io.BytesIO()
        torch.save(model, stored)
        stored.seek(0)
        for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
            assert torch.equal(other(**inputs).logits, expected)
            for parameter in other.prompt_encoder.parameters():
                parameter.mul_(0.5)
            assert not torch.equal(other(**inputs).logits, expected)
            with other.disable_adapter():
                assert torch.equal(other(**inputs).logits, model_of("llama")(**inputs).logits)
            assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_unloaded_leaves_the_model_as_it_was(name):
    base = model_of(name)
    before = [dict(vars(module)) for module in base.modules()]
    model = prompted(name, base=base)
    model(**labelled(name)).loss.backward()
    model.unload()
    after = [dict(vars(module)) for module in base.modules()]
    assert after == before


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_two_prompts_are_the_prompt_of_both_their_rows(name):
    model, inputs = prompted(name), batch(name)
    model.add_adapter("b", PromptTuningConfig(task_type=task(name), num_virtual_tokens=2))
    activate_together(model, ["default", "b"])
    rows = torch.cat([model.prompt_encoder[adapter].embedding.weight for adapter in ("default", "b")])
    joined = prompted(name, num_virtual_tokens=6)
    with torch.no_grad():
        joined.prompt_encoder["default"].embedding.weight.copy_(rows)
        assert torch.equal(model(**inputs).logits, joined(**inputs).logits)
        model.delete_adapter("b")
        assert torch.equal(model(**inputs).logits, prompted(name)(**inputs).logits)


@pytest.mark.parametrize("first", ["prompt", "low"])
def test_prompt_and_lora_on_the_embedding_too(first):
    """The embedding gets a wrapper after or before the prompt is there: the rows are the prompt's in both cases."""
    low = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    torch.manual_seed(0)
    configs = {"prompt": prompt, "low": low}
    second = "low" if first == "prompt" else "prompt"
    model = get_peft_model(model_of("llama"), configs[first], adapter_name=first)
    model.add_adapter(second, configs[second])
    model.set_adapter(["prompt", "low"])
    base, ids = model.eval().get_base_model(), batch("llama")["input_ids"][:1]
    with torch.no_grad():
        found = model(input_ids=ids).logits
        model.set_adapter("low")
        embeds = torch.cat([model.prompt_encoder["prompt"]()[None], base.get_input_embeddings()(ids)], dim=1)
        expected = base(inputs_embeds=embeds).logits[:, 4:]
    torch.testing.assert_close(found, expected, **CLOSE)


def test_prompt_and_prefix_together():
    model, inputs = prompted("llama"), batch("llama")
    model.add_adapter("p", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.set_adapter(["default", "p"])
    with torch.no_grad():
        both = model(**inputs).logits
        ids = inputs["input_ids"][:1]
        model.set_adapter("p")
        embeds = model.get_base_model().get_input_embeddings()(ids)
        rows = model.prompt_encoder["default"]()[None]
        expected = model(inputs_embeds=torch.cat([rows, embeds], dim=1)).logits[:, 4:]
    torch.testing.assert_close(both[:1], expected, **CLOSE)
    model.set_adapter(["default", "p"])
    found = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))


def mixed(name: str):
    model = prompted(name)
    model.add_adapter("long", PromptTuningConfig(task_type=task(name), num_virtual_tokens=6))
    layers = {"llama": "q_proj", "bert": "query", "t5": "q"}
    model.add_adapter("low", LoraConfig(target_modules=[layers[name]], init_lora_weights=False))
    return model


NAMES = ["long", "__base__", "default", "low", None, "long"]


def wide(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.cat([tensor, tensor.flip(0), tensor]) for key, tensor in labelled(name).items()}


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_each_row_has_its_own_adapter(name):
    model, inputs = mixed(name), wide(name)
    with torch.no_grad():
        found = model(**inputs, adapter_names=NAMES)
        for row, adapter in enumerate(NAMES):
            one = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
            if adapter in (None, "__base__"):
                with model.disable_adapter():
                    expected = model(**one).logits
            else:
                model.set_adapter(adapter)
                expected = model(**one).logits
            torch.testing.assert_close(found.logits[row : row + 1], expected, **CLOSE)
    if name != "llama":  # where a first token is predicted or not, depending on what stands before it
        flat = found.logits.flatten(0, -2)
        torch.testing.assert_close(
            found.loss, torch.nn.functional.cross_entropy(flat, inputs["labels"].flatten()), **CLOSE
        )


def test_each_row_generates_with_its_own_adapter():
    model, inputs = mixed("llama"), batch("llama", left=True)
    inputs = {key: torch.cat([tensor, tensor.flip(0), tensor]) for key, tensor in inputs.items()}
    options = {"max_new_tokens": 4, "do_sample": False}
    found = model.generate(**inputs, adapter_names=NAMES, **options)
    for row, adapter in enumerate(NAMES):
        one = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
        if adapter in (None, "__base__"):
            with model.disable_adapter():
                expected = model.generate(**one, **options)
        else:
            model.set_adapter(adapter)
            expected = model.generate(**one, **options)
        assert torch.equal(found[row : row + 1], expected)


def test_rows_of_different_prompts_share_no_cache():
    with pytest.raises(StateError, match="use_cache"):
        mixed("llama")(**wide("llama"), adapter_names=NAMES, use_cache=True)


def test_threads_with_different_choices_do_not_meet():
    model, inputs, found = prompted("llama"), batch("llama"), {}

    def run(disabled: bool) -> None:
        with torch.no_grad():
            for _ in range(5):
                if disabled:
                    with model.disable_adapter():
                        found[disabled] = model.generate(inputs["input_ids"][:1], max_new_tokens=3, do_sample=False)
                else:
                    found[disabled] = model.generate(inputs["input_ids"][:1], max_new_tokens=3, do_sample=False)

    expected = {}
    for disabled in (False, True):
        run(disabled)
        expected[disabled] = found[disabled]
    threads = [threading.Thread(target=run, args=(disabled,)) for disabled in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[False], expected[False]) and torch.equal(found[True], expected[True])


def test_a_new_embedding_is_followed():
    model, ids = prompted("llama"), batch("llama")["input_ids"][:1]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.get_base_model().resize_token_embeddings(70)
        torch.testing.assert_close(model(input_ids=ids).logits[..., :64], expected, **CLOSE)
    assert (by_hand("llama", model, ids).logits[:, 4:] - expected).abs().max() < 1e-5
