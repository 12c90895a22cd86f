"""LoRA on `nn.MultiheadAttention`: PEFT adds the update of the output projection twice, so that is what files mean."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import deltatune
from tests.peer.pairs import loaded_by_peft, peft, saved_by_peft, scatter

EXACT = {"rtol": 1e-5, "atol": 1e-5}
OPTIONS = [
    {},
    {"use_rslora": True, "r": 3},
    {"lora_bias": True},
    {"rank_pattern": {"attention": 2}, "alpha_pattern": {"attention": 9}},
    {"init_lora_weights": "gaussian", "lora_alpha": 1},
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.last = nn.Linear(16, 8)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.attention(x, x, x)[0])


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", OPTIONS, ids=[" ".join(one) or "defaults" for one in OPTIONS])
def test_files_cross_over(options, tmp_path):
    asked = {"r": 4, "lora_alpha": 8, "target_modules": ["attention", "first"], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = scatter(peft.get_peft_model(Block(), peft.LoraConfig(**asked)), 3).eval()
        if options.get("lora_bias"):  # PEFT neither uses nor trains it: it stays at zero
            theirs.base_model.model.attention.lora_B["default"].bias.data.zero_()
        expected = theirs(X).detach()
        folder = saved_by_peft(theirs, tmp_path / "theirs")
        ours = deltatune.PeftModel.from_pretrained(Block(), folder).eval()
        assert_close(ours(X), expected, **EXACT)
        assert (Block()(X) - expected).abs().max() > 1e-2, "the adapter does nothing here"

        ours.merge_adapter()
        assert_close(ours(X), expected, **EXACT)
        ours.unmerge_adapter()
        ours.save_pretrained(tmp_path / "again")
        assert_close(loaded_by_peft(Block(), tmp_path / "again").eval()(X), expected, **EXACT)

        made = scatter(deltatune.get_peft_model(Block(), deltatune.LoraConfig(**asked)), 5).eval()
        if options.get("lora_bias"):
            made.base_model.model.attention.lora_B["default"].bias.data.zero_()
        made.save_pretrained(tmp_path / "ours")
        assert_close(loaded_by_peft(Block(), tmp_path / "ours").eval()(X), made(X), **EXACT)


def test_a_sum_and_a_conversion_keep_what_the_output_projection_does(tmp_path):
    asked = {"r": 4, "target_modules": ["attention", "first"]}
    model = scatter(deltatune.get_peft_model(Block(), deltatune.LoraConfig(**asked)), 3).eval()
    expected = model(X).detach()
    model.add_weighted_adapter(["default"], [1.0], "same", combination_type="svd")
    model.set_adapter("same")
    assert_close(model(X), expected, **EXACT)

    model = scatter(deltatune.get_peft_model(Block(), deltatune.LoHaConfig(**asked)), 3).eval()
    expected = model(X).detach()
    deltatune.save_as_lora(tmp_path, model, None, max_error=1e-4)
    assert_close(deltatune.PeftModel.from_pretrained(Block(), tmp_path).eval()(X), expected, rtol=1e-3, atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(loaded_by_peft(Block(), tmp_path)(X), expected, rtol=1e-3, atol=1e-3)
