"""Rows of one batch with different prefixes: row i equals that row alone with its adapter."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from deltatune import LoraConfig, PeftModel, PrefixTuningConfig
from deltatune.errors import StateError
from deltatune.prompts import attention, masks
from deltatune.prompts.handed import stacked
from tests.prompts.models import KINDS, bare, batch, gradients, prefixed, redraw

ROWS = ["default", "__base__", "long", "low", "default", "long"]
NEW = 5


def mixed(name: str, implementation: str | None = None, lora: bool = True, **settings: Any) -> PeftModel:
    """Prefixes of 4 and of 7 tokens, and a LoRA adapter."""
    model = prefixed(name, bare(name, implementation), **settings)
    task = KINDS[name][1]
    model.add_adapter("long", PrefixTuningConfig(task_type=task, **{**settings, "num_virtual_tokens": 7}))
    redraw(model)
    if not lora:
        return model.eval()
    model.add_adapter("low", LoraConfig(task_type=task, r=2, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".low" in path:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def six_rows(name: str, left: bool = False) -> dict[str, Tensor]:
    two = batch(name, left)
    return {key: tensor.repeat(3, 1) for key, tensor in two.items()}


def alone(model: PeftModel, adapter: str) -> Any:
    if adapter == "__base__":
        return model.disable_adapter()
    model.set_adapter(adapter)
    return nullcontext()


def check_each_row_alone(model: PeftModel, inputs: dict[str, Tensor], rows: list[str]) -> None:
    with torch.no_grad():
        together = model(**inputs, adapter_names=rows).logits
        for index, adapter in enumerate(rows):
            row = {key: tensor[index : index + 1] for key, tensor in inputs.items()}
            with alone(model, adapter):
                found, expected = together[index : index + 1], model(**row).logits
            if found.ndim == 3 and found.shape[1] == inputs["attention_mask"].shape[1]:
                real = row["attention_mask"].bool()
                found, expected = found[real], expected[real]
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "latent", "hybrid", "bert", "t5", "bart"])
def test_a_row_of_a_mixed_batch_equals_that_row_alone(name, implementation, left):
    check_each_row_alone(mixed(name, implementation, sites="all"), six_rows(name, left), ROWS)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    "name", ["bloom", "gptj", "mpt", "falcon", "falcon-alibi", "rembert", "deberta", "xlnet", "mvp"]
)
def test_rows_of_attention_outside_of_the_interface_equal_each_alone(name, left):
    rows = ["default", "__base__", "long", "long", "default", "__base__"]
    check_each_row_alone(mixed(name, lora=False, sites="all"), six_rows(name, left), rows)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_rows_without_a_mask_equal_each_alone(name, implementation):
    model = mixed(name, implementation)
    inputs = {key: tensor for key, tensor in six_rows(name).items() if key != "attention_mask"}
    with torch.no_grad():
        together = model(**inputs, adapter_names=ROWS).logits
        for index, adapter in enumerate(ROWS):
            with alone(model, adapter):
                expected = model(**{key: tensor[index : index + 1] for key, tensor in inputs.items()}).logits
            torch.testing.assert_close(together[index : index + 1], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_the_users_own_hold_for_each_row(kind):
    model, ids = mixed("llama"), six_rows("llama")["input_ids"]
    seen = torch.ones(6, 1, 8, 8, dtype=torch.bool).tril() & (torch.rand(6, 1, 8, 8) > 0.3)
    seen |= torch.eye(8, dtype=torch.bool)
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask, adapter_names=ROWS).logits
        for index, adapter in enumerate(ROWS):
            row = slice(index, index + 1)
            with alone(model, adapter):
                expected = model(input_ids=ids[row], attention_mask=mask[row]).logits
            torch.testing.assert_close(together[row], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}, {"num_beams": 2, "use_cache": False}])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "bloom", "mvp"])
def test_rows_generate_what_each_generates_alone(name, options):
    model = mixed(name, sites="all")
    inputs = {
        key: value
        for key, value in six_rows(name, left=name in ("llama", "gpt2", "bloom")).items()
        if "decoder" not in key
    }
    settings = {"max_new_tokens": NEW, "do_sample": False, **options}
    together = model.generate(**inputs, adapter_names=ROWS, **settings)[:, -NEW:]
    for index, adapter in enumerate(ROWS):
        row = {key: tensor[index : index + 1] for key, tensor in inputs.items()}
        with alone(model, adapter):
            assert together[index].tolist() == model.generate(**row, **settings)[0, -NEW:].tolist()


def test_rows_generate_with_a_static_cache():
    model = mixed("llama")
    inputs = six_rows("llama", left=True)
    settings = {"max_new_tokens": NEW, "do_sample": False, "adapter_names": ROWS}
    assert torch.equal(
        model.generate(**inputs, **settings), model.generate(**inputs, cache_implementation="static", **settings)
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("projection", [False, True])
def test_rows_train_their_own_prefix_and_no_other(projection, checkpointing):
    model = mixed("llama", prefix_projection=projection).double().train()
    inputs = six_rows("llama")
    model.set_adapter(["default", "long"])
    if checkpointing:
        model.gradient_checkpointing_enable()
    rows = ["default", "__base__", "default", "__base__", "default", "__base__"]
    model(**inputs, adapter_names=rows).logits[::2].square().mean().backward()
    found = [p.grad for p in model.prompt_encoder["default"].parameters()]
    assert all(p.grad is None or not p.grad.any() for p in model.prompt_encoder["long"].parameters())
    only = prefixed("llama", prefix_projection=projection).double().train()
    only.prompt_encoder["default"].load_state_dict(model.prompt_encoder["default"].state_dict())
    expected = gradients(only, {key: tensor[::2] for key, tensor in inputs.items()})
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-6)


def test_the_trained_head_of_a_row_is_that_of_its_adapter():
    model, inputs = mixed("bert"), six_rows("bert")
    with torch.no_grad():
        for seed, copy in enumerate(model.get_base_model().classifier.modules_to_save.values()):
            torch.manual_seed(seed)
            copy.bias.copy_(torch.randn(3))
        together = model(**inputs, adapter_names=ROWS).logits
        for index, adapter in enumerate(ROWS):
            with alone(model, adapter):
                expected = model(**{key: tensor[index : index + 1] for key, tensor in inputs.items()}).logits
            torch.testing.assert_close(together[index : index + 1], expected, atol=2e-5, rtol=1e-4)


def test_rows_of_one_adapter_are_that_adapter():
    for layout in ("native", "peft"):
        model, inputs = prefixed("llama", layout=layout), six_rows("llama")
        assert torch.equal(model(**inputs, adapter_names=["default"] * 6).logits, model(**inputs).logits)


def test_rows_that_cannot_be_right_are_refused():
    model, inputs = prefixed("llama", layout="peft"), six_rows("llama")
    with pytest.raises(StateError, match="'default' has layout='peft'"):
        model(**inputs, adapter_names=["default"] * 5 + ["__base__"])
    with pytest.raises(StateError, match="5 names for a batch of 6 rows"):
        mixed("llama")(**inputs, adapter_names=ROWS[:5])


# ------------------------------------------------------------------------------------------------- the call by itself

HEADS, DIM, K = 2, 8, 5
LOWER = torch.ones(K, K, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    ("backend", "mask", "causal", "seen"),
    [
        ("sdpa", None, True, LOWER),
        ("sdpa", None, False, torch.ones(K, K, dtype=torch.bool)),
        ("eager", None, True, torch.ones(K, K, dtype=torch.bool)),
        ("sdpa", LOWER[None, None], True, LOWER),
        ("eager", torch.zeros(1, 1, K, K).masked_fill(~LOWER, torch.finfo(torch.float32).min), True, LOWER),
    ],
)
def test_attention_with_a_prefix_per_row_is_the_softmax_over_what_the_row_sees(backend, mask, causal, seen):
    torch.manual_seed(0)
    module = nn.Module().eval()
    module.is_causal, module.num_key_value_groups = causal, 1
    query, key, value = torch.randn(3, 3, HEADS, K, DIM).unbind()
    parts = [(torch.randn(HEADS, n, DIM), torch.randn(HEADS, n, DIM)) for n in (2, 4)]
    prefix = stacked([parts[0], None, parts[1]])

    class Stage:
        def prefix_of(self, site: str, batch: int) -> Any:
            return prefix

        def past(self, site: str) -> None:
            return None

    vars(module)[attention.SLOT] = attention.Slot(Stage(), "site")  # type: ignore[arg-type]
    inner = {"sdpa": sdpa_attention_forward, "eager": eager_attention_forward}[backend]
    found, _ = attention.attend(inner, backend, module, query, key, value, mask, scaling=0.3)
    for row, part in enumerate([parts[0], None, parts[1]]):
        scores = (query[row] @ key[row].mT * 0.3).masked_fill(~seen, -torch.inf)
        values = value[row]
        if part is not None:
            scores = torch.cat([query[row] @ part[0].mT * 0.3, scores], -1)
            values = torch.cat([part[1], values], 1)
        torch.testing.assert_close(found[row], (scores.softmax(-1) @ values).transpose(0, 1))


def test_masks_of_flash_and_flex_say_what_each_row_sees():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    key, visible = torch.zeros(2, HEADS, K, DIM), torch.tensor([[True, False], [False, False]])

    def extend(backend: str, mask: Any) -> Any:
        return masks.extend(backend, nn.Linear(1, 1), key, key, key, mask, {}, 2, visible=visible)[2]

    assert extend("flash_attention_2", None).tolist() == [[1, 0, *[1] * K], [0, 0, *[1] * K]]
    block = flex.create_block_mask(lambda b, h, q, kv: q >= kv, None, None, K, K, device="cpu")
    longer = extend("flex_attention", block)
    for row in range(2):
        answers = [bool(longer.mask_mod(*map(torch.tensor, (row, 0, 1, kv)))) for kv in range(2 + K)]
        assert answers == [*visible[row].tolist(), True, True, False, False, False]
    assert extend("flex_attention", block) is longer
    scores = extend("flex_attention", None)
    assert scores.shape == (2, 1, K, 2 + K) and (scores[0, 0, 0, :2] == torch.tensor([0.0, -torch.inf])).all()
