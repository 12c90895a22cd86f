"""Which layout a prefix gets that asks for none, and what PEFT's means while a window slides."""

import pytest
import torch

from deltatune import AdaptionPromptConfig, PrefixTuningConfig, get_peft_model
from deltatune.errors import PeftWarning, TargetError
from deltatune.prompts import config as prompts
from tests.prompts.models import bare, batch, prefixed


@pytest.fixture
def as_in_peft(monkeypatch):
    monkeypatch.setattr(prompts, "usual_layout", "peft")  # what deltatune.as_peft does


def config(**options):
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **options)


def test_native_is_the_default():
    assert config().layout == AdaptionPromptConfig().layout == "native"
    assert get_peft_model(bare("gpt2"), config()).peft_config["default"].layout == "native"


@pytest.mark.usefixtures("as_in_peft")
def test_programs_written_for_peft_get_its_layout_unless_they_choose():
    assert get_peft_model(bare("gpt2"), config()).peft_config["default"].layout == "peft"
    assert AdaptionPromptConfig().layout == "peft"
    assert get_peft_model(bare("gpt2"), config(layout="native")).peft_config["default"].layout == "native"
    assert config(sites="all").layout == PrefixTuningConfig.p_tuning_v2("CAUSAL_LM").layout == "native"


@pytest.mark.usefixtures("as_in_peft")
def test_where_pefts_numbers_are_not_known_a_warning_says_so_and_the_prefix_is_native():
    with pytest.warns(PeftWarning, match="BloomForCausalLM: PEFT's layout is not available.*are not those that PEFT"):
        model = get_peft_model(bare("bloom"), config())
    assert model.peft_config["default"].layout == "native"
    with pytest.raises(TargetError, match="PEFT's layout is not available"):
        get_peft_model(bare("bloom"), config(layout="peft"))


@pytest.mark.usefixtures("as_in_peft")
def test_a_prefix_of_which_a_part_is_never_read_is_said_to_be_one():
    wanted = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    with pytest.warns(PeftWarning, match="a part of this prefix is never read.*layout='native'"):
        model = get_peft_model(bare("t5"), wanted)
    model(**batch("t5")).logits.square().mean().backward()
    found = next(p for p in model.parameters() if p.requires_grad).grad.abs().sum(0) > 0
    assert found.sum() * 2 == len(found)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_token_by_token_a_window_slides_out_of_the_prefix_as_in_one_pass(attention):
    model = prefixed("mistral", bare("mistral", attention), layout="peft")
    ids = torch.arange(5, 15)[None]
    whole = model(input_ids=ids).logits
    first = model(input_ids=ids[:, :4], use_cache=True)
    steps = [model(input_ids=ids[:, t : t + 1], past_key_values=first.past_key_values).logits for t in range(4, 10)]
    torch.testing.assert_close(torch.cat([first.logits, *steps], 1), whole, rtol=1e-4, atol=1e-4)
