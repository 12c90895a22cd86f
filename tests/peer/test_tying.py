"""Tied embeddings in files of PEFT 0.21.2 and ours."""

import warnings

import pytest
import torch
from torch.testing import assert_close

import deltatune
from tests.core.tiny import batch, logits, tiny
from tests.peer.crossing import EXACT
from tests.peer.pairs import loaded_by_peft, peft, saved_by_peft, scatter

OPTIONS = [
    {"target_modules": ["embed_tokens"]},
    {"target_modules": ["lm_head"]},
    {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 9]},
    {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [1, 5]}},
]


def base():
    return tiny("llama", tie_word_embeddings=True)


def of_peft(**options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        return scatter(peft.get_peft_model(base(), peft.LoraConfig(r=2, **options)), 3)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_files_both_ways(options, tie, tmp_path):
    options, inputs = {**options, "ensure_weight_tying": tie}, batch("llama")
    model = of_peft(**options)
    expected = logits(model, inputs)
    ours = deltatune.PeftModel.from_pretrained(base(), saved_by_peft(model, tmp_path / "theirs"))
    assert_close(logits(ours, inputs), expected, **EXACT)
    torch.manual_seed(5)
    made = scatter(deltatune.get_peft_model(base(), deltatune.LoraConfig(r=2, **options)), 11)
    made.save_pretrained(tmp_path / "ours")
    assert_close(logits(loaded_by_peft(base(), tmp_path / "ours"), inputs), logits(made, inputs), **EXACT)
    if tie:
        assert_close(logits(ours.merge_and_unload(), inputs), expected, **EXACT)


@pytest.mark.filterwarnings("ignore:the merged embedding")
def test_merging_without_tying_is_right_where_peft_changes_the_head_too(tmp_path):
    model, inputs = of_peft(target_modules=["embed_tokens"]), batch("llama")
    expected = logits(model, inputs)
    ours = deltatune.PeftModel.from_pretrained(base(), saved_by_peft(model, tmp_path))
    assert_close(logits(ours.merge_and_unload(), inputs), expected, **EXACT)
    assert (logits(model.merge_and_unload(), inputs) - expected).abs().max() > 0.1
