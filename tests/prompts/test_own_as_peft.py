"""PEFT's layout where modules compute attention by themselves: PEFT's numbers, or a reason and no trace of it."""

import peft
import pytest
import torch

from deltatune import PeftModel, PrefixTuningConfig, get_peft_model
from deltatune.errors import PeftWarning, TargetError
from tests.prompts.models import KINDS, bare, batch, prefixed

REASONS = {
    "bloom": r"ALiBi",
    "mpt": r"ALiBi",
    "falcon-alibi": r"answers otherwise",
    "gptj": r"'transformer\.h\.0\.attn' enter where they cannot be moved",
    "rembert": r"no decoder",
    "mvp": r"decoder's attention is code of its own",
}


@pytest.mark.parametrize("name", ["falcon", "gpt-neo", "xglm"])
def test_files_cross_over_both_ways(name, tmp_path):
    ours, inputs = prefixed(name, layout="peft"), batch(name)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(bare(name), tmp_path / "ours").eval()
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = theirs(**inputs).logits
        torch.testing.assert_close(ours(**inputs).logits[kept], expected[kept], rtol=1e-5, atol=1e-5)
        assert (bare(name)(**inputs).logits - expected)[kept].abs().max() > 0.1
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(bare(name), tmp_path / "theirs").eval()
    assert again.peft_config["default"].layout == "peft"
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits[kept], expected[kept], rtol=1e-5, atol=1e-5)
        asked = {"input_ids": inputs["input_ids"][:1], "max_new_tokens": 5, "do_sample": False}
        torch.testing.assert_close(again.generate(**asked), theirs.generate(**asked))


@pytest.mark.parametrize("name", REASONS)
def test_what_peft_computes_in_another_way_is_refused_with_the_reason(name):
    base = bare(name)
    modules = {path: (len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in base.named_modules()}
    attributes = {path: set(vars(module)) for path, module in base.named_modules()}
    config = PrefixTuningConfig(task_type=KINDS[name][1], num_virtual_tokens=4, layout="peft")
    with pytest.raises(TargetError, match=rf"PEFT's layout is not available.*{REASONS[name]}.*layout='native'"):
        get_peft_model(base, config)
    assert {p: (len(m._forward_hooks), len(m._forward_pre_hooks)) for p, m in base.named_modules()} == modules
    assert {path: set(vars(module)) for path, module in base.named_modules()} == attributes
    assert config.site_names is None and config.num_layers is None
    assert get_peft_model(base, PrefixTuningConfig(task_type=KINDS[name][1], num_virtual_tokens=4)) is not None


@pytest.mark.parametrize("name, layout", [("falcon", "peft"), ("bloom", "native")])
def test_a_layout_left_open_is_pefts_where_it_can_be(name, layout):
    config = PrefixTuningConfig(task_type=KINDS[name][1], num_virtual_tokens=4)
    config.layout = None
    if layout == "native":
        with pytest.warns(PeftWarning, match=r"ALiBi.*not those that PEFT would compute"):
            model = get_peft_model(bare(name), config)
    else:
        model = get_peft_model(bare(name), config)
    assert model.peft_config["default"].layout == layout
    assert model.prefixes["default"].stage.prefixes.keys() == {"default"}
