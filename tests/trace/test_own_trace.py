"""What a trace says of attention that modules compute by themselves, compared with what reaches softmax and kernel."""

from io import StringIO

import pytest
import torch
from rich.console import Console
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from deltatune.trace import trace
from deltatune.trace.page import write_page
from deltatune.trace.report import TraceReport
from deltatune.trace.tree import as_tree
from tests.prompts.models import batch, prefixed

P, TOKENS = 4, 8


def loss(output):
    return output.logits.square().mean()


class Spy(TorchFunctionMode):
    """Sees the logits that reach the softmax, those of the prefix included."""

    def __init__(self):
        super().__init__()
        self.softmaxes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.softmax or func is functional.softmax or func is torch.Tensor.softmax:
            self.softmaxes.append(list(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["gptj", "mpt", "bloom", "rembert", "deberta", "xlnet"])
def test_every_site_is_seen_with_p_more_keys(name):
    model = prefixed(name)
    report = trace(model, batch(name), loss)
    sites = [site.name for site in model.prefixes["default"].sites]
    assert [call.module for call in report.calls] == sites and not report.dead
    spy = Spy()
    with spy:
        model(**batch(name))
    assert [call.length_after in shape for call, shape in zip(report.calls, spy.softmaxes, strict=True)] == [True] * 2
    for call in report.calls:
        assert (call.length_before, call.length_after, call.prefix) == (TOKENS, TOKENS + P, P)
        assert call.query == call.key_before and call.value_after[2] == TOKENS + P and call.kind == "self"
        assert call.mask_before == call.mask_after and call.mask_before[-1] == TOKENS
        assert call.backend == "its own code" and call.where == "deltatune.prompts.own:Grafting"
    biased = name in ("mpt", "bloom", "deberta", "xlnet")
    assert all((call.bias_before is not None) == biased for call in report.calls)


@pytest.mark.parametrize("name", ["falcon", "falcon-alibi"])
def test_fused_calls_are_those_that_reach_the_kernel(name, monkeypatch):
    model = prefixed(name)
    report = trace(model, batch(name), loss)
    kernel, seen = functional.scaled_dot_product_attention, []

    def spied(query, key, value, attn_mask=None, **more):
        seen.append([list(part.shape) for part in (query, key, value, attn_mask)])
        return kernel(query, key, value, attn_mask=attn_mask, **more)

    monkeypatch.setattr("deltatune.prompts.own.FUSED", spied)
    model(**batch(name))
    assert [[call.query, call.key_after, call.value_after, call.mask_after] for call in report.calls] == seen
    assert {call.length_after - call.length_before for call in report.calls} == {P}


def test_attention_without_a_prefix_is_listed_too():
    report = trace(prefixed("mvp"), batch("mvp"), loss)
    found = {(call.kind, call.length_before, call.length_after) for call in report.calls}
    assert found == {("encoder", 8, 8), ("self", 6, 6 + P), ("cross", 8, 8)} and len(report.calls) == 6
    assert {call.where for call in report.calls if not call.prefix} == {
        "transformers.models.mvp.modeling_mvp:MvpAttention.forward"
    }


def test_the_report_can_be_shown_and_read_again(tmp_path):
    report = trace(prefixed("bloom"), batch("bloom"), loss)
    assert TraceReport.from_dict(report.to_dict()) == report
    write_page(report, tmp_path / "trace.html")
    assert "its own code" in (tmp_path / "trace.html").read_text()
    assert "2 calls of self-attention, with a prefix" in _text(as_tree(report))


def test_the_model_computes_what_it_did_before():
    model, inputs = prefixed("gptj"), batch("gptj")
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    before = model(**inputs).logits
    trace(model, inputs, loss)
    assert torch.equal(model(**inputs).logits, before)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


def test_a_pass_that_fails_leaves_no_mode_behind():
    model, inputs = prefixed("gptj"), batch("gptj")
    broken = model.get_base_model().transformer.h[1].attn.out_proj

    def fail(module, args):
        raise RuntimeError("as asked")

    handle = broken.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="as asked"):
        trace(model, inputs, loss)
    handle.remove()
    assert torch.overrides._get_current_function_mode() is None
    assert not trace(model, inputs, loss).dead


def _text(tree):
    console = Console(file=StringIO(), width=120)
    console.print(tree)
    return console.file.getvalue()
