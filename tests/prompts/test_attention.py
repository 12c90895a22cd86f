"""The seam itself: attention over [prefix; tokens], written out, against every way a backend takes its mask."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.llama.modeling_llama import eager_attention_forward

from deltatune.errors import StateError
from deltatune.prompts import attention
from deltatune.prompts.handed import KeysValues
from tests.prompts.models import bare, prefixed

HEADS, KV_HEADS, DIM, P = 4, 2, 8, 3


class FakeStage:
    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.pair = KeysValues(key, value)

    def prefix_of(self, site: str, batch: int) -> KeysValues:
        return self.pair

    def past(self, site: str) -> None:
        return None


def call(backend: str, queries: int, keys: int, mask, causal: bool = True, **kwargs):
    """One attention call with a prefix; the inputs too, for the formula."""
    torch.manual_seed(0)
    module = nn.Module().eval()
    module.is_causal, module.num_key_value_groups = causal, HEADS // KV_HEADS
    query = torch.randn(2, HEADS, queries, DIM)
    key, value = torch.randn(2, KV_HEADS, keys, DIM), torch.randn(2, KV_HEADS, keys, DIM)
    prefix = torch.randn(KV_HEADS, P, DIM), torch.randn(KV_HEADS, P, DIM)
    vars(module)[attention.SLOT] = attention.Slot(FakeStage(*prefix), "site")
    inner = {"sdpa": sdpa_attention_forward, "eager": eager_attention_forward}[backend]
    output, _ = attention.attend(inner, backend, module, query, key, value, mask, scaling=0.3, **kwargs)
    return output, query, key, value, prefix


def formula(query: Tensor, key: Tensor, value: Tensor, prefix, seen: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """softmax(q [P_K; K]^T * scale + bias over what is seen) [P_V; V]; the prefix is seen by all, without a bias."""
    key = torch.cat([prefix[0].expand(2, -1, -1, -1), key], 2).repeat_interleave(HEADS // KV_HEADS, 1)
    value = torch.cat([prefix[1].expand(2, -1, -1, -1), value], 2).repeat_interleave(HEADS // KV_HEADS, 1)
    scores = query @ key.mT * 0.3
    scores[..., P:] = (scores[..., P:] + bias).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


LOWER = torch.ones(5, 5, dtype=torch.bool).tril()
PADDED = torch.stack([LOWER, LOWER & (torch.arange(5) >= 2)])[:, None]  # rows 0 and 1 of the second see no token


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize(
    ("backend", "mask", "causal", "seen"),
    [
        ("sdpa", None, True, LOWER),
        ("sdpa", None, False, torch.ones(5, 5, dtype=torch.bool)),
        ("eager", None, True, torch.ones(5, 5, dtype=torch.bool)),
        ("sdpa", PADDED, True, PADDED),
        ("sdpa", additive(PADDED), True, PADDED),
        ("eager", additive(PADDED), True, PADDED),
        ("sdpa", torch.tensor([True, False]).view(2, 1, 1, 1), False, torch.tensor([True, False]).view(2, 1, 1, 1)),
    ],
)
def test_attention_is_the_softmax_over_prefix_and_tokens(backend, mask, causal, seen):
    output, *inputs = call(backend, 5, 5, mask, causal)
    torch.testing.assert_close(output, formula(*inputs, seen))
    assert output.isfinite().all()


def test_one_query_sees_all_keys_without_a_mask():
    output, *inputs = call("sdpa", 1, 7, None)
    torch.testing.assert_close(output, formula(*inputs, torch.ones(1, 7, dtype=torch.bool)))


def test_keys_of_a_static_cache_beyond_the_queries_are_not_seen():
    output, query, key, value, prefix = call("sdpa", 5, 9, None)
    torch.testing.assert_close(output, formula(query, key[:, :, :5], value[:, :, :5], prefix, LOWER))


def test_a_mask_that_is_longer_than_the_keys_is_cut():
    longer = torch.cat([additive(PADDED), torch.zeros(2, 1, 5, 4)], -1)
    output, *inputs = call("eager", 5, 5, longer)
    torch.testing.assert_close(output, formula(*inputs, PADDED))


@pytest.mark.parametrize("mask", [None, additive(PADDED)])
def test_a_position_bias_is_none_for_the_prefix(mask):
    bias = torch.randn(1, HEADS, 5, 5)
    output, *inputs = call("sdpa", 5, 5, mask, position_bias=bias)
    torch.testing.assert_close(output, formula(*inputs, LOWER if mask is None else PADDED, bias))


def test_a_block_mask_answers_for_the_tokens_as_before_and_yes_for_the_prefix():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    from deltatune.prompts import masks

    block = flex.create_block_mask(lambda b, h, q, kv: (q >= kv) & (kv >= b), 2, None, 5, 5, device="cpu")
    key = torch.zeros(2, KV_HEADS, 5, DIM)
    _, _, longer, _ = masks.extend("flex_attention", nn.Module(), key, key, key, block, {}, P, None)
    for b in range(2):
        for q in range(5):
            answers = [bool(longer.mask_mod(*map(torch.tensor, (b, 0, q, kv)))) for kv in range(P + 5)]
            assert answers == [True] * P + [q >= kv >= b for kv in range(5)]
    assert longer.seq_lengths == (5, P + 5)
    assert masks.extend("flex_attention", nn.Module(), key, key, key, block, {}, P, None)[2] is longer


def test_flash_masks_of_keys_get_ones_and_what_flash_cannot_do_is_refused():
    from deltatune.prompts import masks

    key, mask = torch.zeros(2, KV_HEADS, 5, DIM), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])

    def extend(mask=None, **kwargs):
        return masks.extend("flash_attention_2", nn.Linear(1, 1), key, key, key, mask, kwargs, P, None)

    assert extend(mask)[2].tolist() == [[1, 1, 1, 0, 1, 1, 1, 1], [1] * 8]
    assert extend(None, position_ids=torch.arange(5)[None])[2:] == (None, {})
    for unsuited in (
        {"sliding_window": 4},
        {"cu_seq_lens_q": mask},
        {"position_ids": torch.tensor([[0, 1, 0, 1, 2]])},
        {"position_bias": key},
        {"cache": object()},
    ):
        with pytest.raises(StateError, match="Linear: a prefix cannot be combined with"):
            extend(None, **unsuited)


# ------------------------------------------------------------------------------------------------------------ the hook


def test_the_hook_goes_on_once_and_comes_off_whole():
    attention.uninstall()
    before = dict(vars(AttentionInterface))
    try:
        attention.install()
        attention.install()
        for function in (ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None), ALL_ATTENTION_FUNCTIONS["sdpa"]):
            assert function.func is attention.attend and function.args == (sdpa_attention_forward, "sdpa")
        eager = ALL_ATTENTION_FUNCTIONS.get_interface("eager", eager_attention_forward)
        assert eager.args == (eager_attention_forward, "eager")
    finally:
        attention.uninstall()
    assert dict(vars(AttentionInterface)) == before
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    attention.install()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_model_without_a_prefix_does_not_notice_the_hook(name):
    from tests.prompts.models import batch

    model = bare(name)
    attention.uninstall()
    with torch.no_grad():
        expected = model(**batch(name)).logits
        attention.install()
        assert torch.equal(model(**batch(name)).logits, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("settings", [{}, {"prefix_projection": True}, {"layout": "peft"}])
def test_a_copy_has_the_same_outputs_and_a_prefix_of_its_own(copied, settings):
    from tests.prompts.models import batch, redraw

    model = prefixed("gpt2", **settings)
    with torch.no_grad():
        expected = model(**batch("gpt2")).logits
        twin = copied(model)
        assert torch.equal(twin(**batch("gpt2")).logits, expected)
        redraw(twin, seed=8)
        assert not torch.equal(twin(**batch("gpt2")).logits, expected)
        assert torch.equal(model(**batch("gpt2")).logits, expected)
        twin.unload()
        assert torch.equal(model(**batch("gpt2")).logits, expected)
