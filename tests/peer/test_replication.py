"""`layer_replication` in files of PEFT 0.21.2 and ours."""

import peft.tuners.tuners_utils
import pytest
from torch.testing import assert_close

import deltatune
from deltatune.errors import ConfigError, StateError
from deltatune.replication import replicate_layers
from tests.core.tiny import batch, logits, tiny
from tests.peer.crossing import EXACT, crosses_over, trains_alike
from tests.peer.pairs import configs, saved_by_peft, theirs

SPANS = [[0, 2], [1, 3], [0, 1]]


@pytest.mark.parametrize("options", [{}, {"target_modules": ["down_proj"], "layers_to_transform": [1, 3]}], ids=str)
def test_adapters_of_replicas(options, tmp_path):
    pair = configs("lora", "llama", **{"target_modules": ["q_proj", "v_proj"], "layer_replication": SPANS, **options})
    model, made = crosses_over(*pair, "llama", tmp_path)
    assert model.get_nb_trainable_parameters() == made.get_nb_trainable_parameters()


def test_training(tmp_path):
    trains_alike(configs("lora", "llama", target_modules=["q_proj"], layer_replication=SPANS)[0], "llama", tmp_path)


def test_merging_is_right_where_peft_adds_all_replicas_to_the_shared_weight(tmp_path):
    their_config = configs("lora", "llama", target_modules=["q_proj"], layer_replication=SPANS)[0]
    model, inputs = theirs("llama", their_config), batch("llama")
    expected = logits(model, inputs)
    ours = deltatune.PeftModel.from_pretrained(tiny("llama"), saved_by_peft(model, tmp_path))
    assert_close(logits(ours.merge_and_unload(), inputs), expected, **EXACT)
    assert (logits(model.merge_and_unload(), inputs) - expected).abs().max() > 1e-2


def test_the_function_makes_the_model_that_pefts_makes():
    ours, made, inputs = tiny("llama"), tiny("llama"), batch("llama")
    replicate_layers(ours, SPANS)
    peft.tuners.tuners_utils.replicate_layers(made, SPANS)
    assert [*ours.state_dict()] == [*made.state_dict()]
    assert ours.config.num_hidden_layers == made.config.num_hidden_layers == 5
    assert_close(logits(ours, inputs), logits(made, inputs), **EXACT)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in tiny("llama").parameters())
    model = deltatune.get_peft_model(ours, deltatune.LoraConfig(r=2, target_modules=["q_proj"]))
    assert model.get_nb_trainable_parameters()[0] == 5 * 2 * 2 * ours.config.hidden_size
    with pytest.raises(StateError, match="carry adapters already"):
        replicate_layers(ours, [[0, 1]])
    with pytest.raises(ConfigError, match=r"replicate_layers.*\(start, end\)"):
        replicate_layers(tiny("llama"), [[2, 1]])
