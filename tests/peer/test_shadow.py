"""ShadowPEFT's files cross over. PEFT also saves what nothing reads, and warns where a file lacks it."""

import random
import warnings

import pytest
from torch.testing import assert_close

import deltatune
from tests.core.tiny import batch, logits, tiny
from tests.peer.crossing import EXACT, losses
from tests.peer.pairs import peft, saved_by_peft, scatter, theirs


def drawn(seed: int) -> dict:
    draw = random.Random(seed)
    options = {"r": draw.choice([1, 3]), "shadow_alpha": draw.choice([0.1, 0.7]), "init_weights": draw.random() < 0.5}
    if draw.random() < 0.5:
        options["update_hidden_size"] = 5
    if draw.random() < 0.5:
        options |= {"shadow_hidden_size": 8, "shadow_num_attention_heads": 2}
    if draw.random() < 0.5:
        options["share_embeddings"] = False
    if draw.random() < 0.5:
        options["target_modules"] = r".*\.(layers|h)\.[01]"
    options["shadow_num_hidden_layers"] = draw.choice([None, 2])
    options["shadow_intermediate_size"] = draw.choice([None, 12])
    return options


def loaded_with_dead_parts_missing(base, folder):
    """PEFT's warning names only parts that no pass reads."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, folder).eval()
    missing = [str(w.message) for w in caught if "Found missing adapter keys" in str(w.message)]
    for message in missing:
        keys = [key for key in message.split("'") if key.startswith("base_model.")]
        assert keys and all("shadow_update_" in key or key.endswith("wte.weight") for key in keys)
    return model


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_random_options(arch, seed, tmp_path):
    options = {"task_type": "CAUSAL_LM", **drawn(seed)}
    model, inputs = theirs(arch, peft.ShadowConfig(**options)), batch(arch)
    expected = logits(model, inputs)
    ours = deltatune.PeftModel.from_pretrained(tiny(arch), saved_by_peft(model, tmp_path / "theirs"))
    assert_close(logits(ours, inputs), expected, **EXACT)
    made = scatter(deltatune.get_peft_model(tiny(arch), deltatune.ShadowConfig(**options)), 11)
    made.save_pretrained(tmp_path / "ours")
    back = loaded_with_dead_parts_missing(tiny(arch), tmp_path / "ours")
    assert_close(logits(back, inputs), logits(made, inputs), **EXACT)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_twenty_steps(weight, tmp_path):
    config = peft.ShadowConfig(task_type="CAUSAL_LM", r=4, shadow_dropout=0.0, auxiliary_loss_weight=weight)
    model = theirs("llama", config)
    ours = deltatune.PeftModel.from_pretrained(tiny("llama"), saved_by_peft(model, tmp_path), is_trainable=True)
    expected = losses(model, "llama", 20)
    assert expected[-4] < expected[0]
    assert losses(ours, "llama", 20) == pytest.approx(expected, abs=1e-4)
