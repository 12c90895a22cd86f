"""The fast form of a prefix, against one plain softmax and against putting the prefix before keys and values."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from deltatune.errors import ConfigError
from deltatune.prompts import attention, merge
from deltatune.prompts.handed import KeysValues
from tests.prompts.models import bare, batch, gradients, prefixed

HEADS, DIM, P, SCALE = 4, 8, 5, 0.3


def inputs(queries: int, keys: int, groups: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """Query, key, value, and the prefix's key and value."""
    torch.manual_seed(0)
    sizes = [(2, queries, HEADS, DIM), *[(2, keys, HEADS // groups, DIM)] * 2]
    tokens = [torch.randn(size, device=device).to(dtype).transpose(1, 2) for size in sizes]
    prefix = [torch.randn(HEADS // groups, P, DIM, device=device).to(dtype) for _ in range(2)]
    return [tensor.requires_grad_() for tensor in (*tokens, *prefix)]


def mask_of(kind: str, queries: int, keys: int) -> Tensor | None:
    """Every kind has a query that sees no token."""
    torch.manual_seed(1)
    if kind == "bool":
        mask = torch.rand(2, 1, queries, keys) > 0.4
        mask[0, :, 0] = False
        return mask
    if kind == "float":
        mask = torch.randn(1, HEADS, queries, keys)
        mask[0, 0, 0] = -torch.inf
        return mask
    return None


def definition(query, key, value, prefix_key, prefix_value, mask, is_causal):
    """softmax(scale q [P_K; K]^T + [0; mask]) [P_V; V]."""
    groups = query.shape[1] // key.shape[1]
    key = torch.cat([prefix_key.expand(2, -1, -1, -1), key], 2).repeat_interleave(groups, 1)
    value = torch.cat([prefix_value.expand(2, -1, -1, -1), value], 2).repeat_interleave(groups, 1)
    scores = query @ key.mT * SCALE
    head, tail = scores[..., :P], scores[..., P:]
    if is_causal:
        mask = torch.ones(tail.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        tail = tail.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else tail + mask
    return torch.cat([head, tail], -1).softmax(-1) @ value


def with_gradients(function: Any, tensors: list[Tensor], *args: Any) -> list[Tensor]:
    output = function(*tensors, *args)
    torch.manual_seed(2)
    outer = torch.randn(output.shape).to(output)
    return [output, *torch.autograd.grad(output, tensors, outer)]


CASES = [
    (queries, keys, kind, groups)
    for (queries, keys), kind, groups in itertools.product([(7, 7), (1, 9), (3, 9)], ["none", "bool", "float"], [1, 2])
]


@pytest.mark.parametrize("form", [merge.merged, merge.joint])
@pytest.mark.parametrize(("queries", "keys", "kind", "groups"), [*CASES, (7, 7, "causal", 1), (7, 7, "causal", 2)])
def test_both_forms_are_the_softmax_over_prefix_and_tokens(form, queries, keys, kind, groups):
    mask, causal = mask_of(kind, queries, keys), kind == "causal"
    for dtype, output, gradient in ((torch.float64, 1e-12, 1e-12), (torch.float32, 1e-6, 4e-6)):
        tensors = inputs(queries, keys, groups, dtype)
        mask = None if mask is None or mask.dtype == torch.bool else mask.to(dtype)
        mask = mask_of(kind, queries, keys) if mask is None else mask
        found = with_gradients(form, tensors, mask, causal, SCALE)
        expected = with_gradients(definition, tensors, mask, causal)
        for one, other, tolerance in zip(found, expected, (output, *[gradient] * 5), strict=True):
            assert (one - other).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_as_often_as_a_fused_kernel(dtype):
    """Output and gradients are sums of float32 products, rounded twice at the size of the largest term."""
    tensors = inputs(7, 7, 2, dtype)
    found = with_gradients(merge.merged, tensors, None, True, SCALE)
    expected = with_gradients(definition, [t.detach().double().requires_grad_() for t in tensors], None, True)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert (one - other).abs().max() <= 4 * torch.finfo(dtype).eps * max(1.0, other.abs().max().item())


def test_nothing_of_the_size_of_the_scores_is_kept_and_the_prefix_is_there_once():
    query, key, value, prefix_key, prefix_value = inputs(50, 50)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        merge.merged(query, key, value, prefix_key, prefix_value, None, True)
    tokens = query.numel()  # query, key, value and output; L; the prefix
    assert sum(kept.values()) == 4 * tokens + tokens // DIM + 2 * HEADS * P * DIM
    assert 2 * HEADS * 50 * P not in kept.values()


# ----------------------------------------------------------------------------------------------------- at the attention


def attend(form: attention.Backend, query: Tensor, key: Tensor, value: Tensor, *prefix: Tensor, mask=None, **kwargs):
    class Stage:
        def prefix_of(self, site: str, batch: int) -> KeysValues:
            return KeysValues(*prefix)

        def past(self, site: str) -> None:
            return None

    module = nn.Module().eval()
    module.is_causal, module.num_key_value_groups = True, query.shape[1] // key.shape[1]
    vars(module)[attention.SLOT] = attention.Slot(Stage(), "site")  # type: ignore[arg-type]
    with attention.using(form):
        return attention.attend(
            sdpa_attention_forward, "sdpa", module, query, key, value, mask, scaling=SCALE, **kwargs
        )[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("queries", "keys", "kind", "groups"), [*CASES, (5, 9, "causal", 1)])
def test_an_attention_call_is_the_same_in_either_form(queries, keys, kind, groups, bias):
    tensors, mask = inputs(queries, keys, groups), mask_of(kind, queries, keys)
    if kind == "none" and queries == 3:
        mask = torch.ones(2, 1, queries, keys + 4, dtype=torch.bool)  # longer than the keys
    kwargs = {"position_bias": torch.randn(1, HEADS, queries, keys)} if bias else {}
    forms: list[attention.Backend] = ["merge", "concat", "auto"]
    merged, concat, auto = (
        with_gradients(lambda *each, form=form: attend(form, *each, mask=mask, **kwargs), tensors) for form in forms
    )
    for one, other, third in zip(merged, concat, auto, strict=True):
        assert (one - other).abs().max() <= 4e-6 and (third - other).abs().max() <= 4e-6


@pytest.mark.parametrize("queries", [1, 6])
def test_what_the_second_form_does_not_fit_is_done_in_the_first(queries, monkeypatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("merged")

    monkeypatch.setattr(merge, "merged", refuse)
    monkeypatch.setattr(merge, "joint", refuse)
    tensors = inputs(queries, 6)
    with pytest.raises(AssertionError, match="merged"):
        attend("merge", *tensors)
    attend("merge", *tensors, dropout=0.5)
    attend("merge", *tensors[:3], *(part.expand(2, -1, -1, -1) for part in tensors[3:]), torch.ones(2, P).bool())
    attend("concat", *tensors)
    if queries > 1:
        attend("auto", *tensors)


def test_the_choice_is_put_back_and_checked():
    assert attention.backend == "auto"
    with pytest.raises(ConfigError, match="'concat' or 'merge'"), attention.using("fused"):  # type: ignore[arg-type]
        pass
    with attention.using("merge"):
        assert attention.backend == "merge"
    assert attention.backend == "auto"


# ----------------------------------------------------------------------------------------------------------- in a model


@pytest.mark.parametrize("left", [False, True, None])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "glm", "hybrid", "bert", "t5", "bart"])
def test_a_model_has_the_same_gradients_in_either_form(name, left):
    model = prefixed(name, sites="all").double().train()
    rows = batch(name, bool(left))
    if left is None:
        del rows["attention_mask"]
    found = {}
    forms: list[attention.Backend] = ["concat", "merge"]
    for form in forms:
        with attention.using(form):
            found[form] = [model(**rows).logits, *gradients(model, rows)]
    torch.testing.assert_close(found["merge"], found["concat"], atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_checkpointing_and_the_first_layer_keep_the_gradients(name):
    model = prefixed(name, prefix_projection=True).double().train()
    with attention.using("merge"):
        expected = gradients(model, batch(name))
        model.gradient_checkpointing_enable()
        torch.testing.assert_close(gradients(model, batch(name)), expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "t5"])
def test_generation_is_the_same_in_either_form(name, options):
    if name == "t5" and "cache_implementation" in options:
        pytest.skip("T5's static cache is not the point here")
    model, rows = prefixed(name, bare(name).double()), batch(name, left=name != "t5")
    rows = {key: value for key, value in rows.items() if "decoder" not in key}
    found = []
    forms: list[attention.Backend] = ["concat", "merge"]
    for form in forms:
        with attention.using(form):
            found.append(model.generate(**rows, max_new_tokens=6, do_sample=False, **options))
    assert torch.equal(*found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels of CUDA need a GPU")
@pytest.mark.parametrize("kind", ["none", "causal", "bool"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_of_cuda_agree_with_plain_operations(dtype, kind):
    tensors, mask = inputs(33, 33, dtype=dtype, device="cuda"), mask_of(kind, 33, 33)
    mask = None if mask is None else mask.cuda()
    found = with_gradients(merge.merged, tensors, mask, kind == "causal", SCALE)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = with_gradients(merge.joint, wide, mask, kind == "causal", SCALE)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 8 * torch.finfo(dtype).eps * max(1.0, other.abs().max().item())
