"""Methods that train parts of the base as copies, beside PEFT 0.21.2: trainable tokens and LN tuning."""

import random

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import deltatune
from tests.core.tiny import TASKS, batch, logits, tiny
from tests.peer.crossing import EXACT, crosses_over, trains_alike
from tests.peer.pairs import ATTENTION, loaded_by_peft, peft, saved_by_peft, scatter, theirs

ARCHITECTURES = ("gpt2", "llama", "t5", "bart")  # BERT has no head over tokens; it gets its own test
CHOSEN = [5, 3, 11, *range(20, 40)]


def tokens(arch: str, **options):
    arguments = {"task_type": TASKS[arch], "token_indices": CHOSEN, **options}
    return peft.TrainableTokensConfig(**arguments), deltatune.TrainableTokensConfig(**arguments)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_trainable_tokens(arch, tmp_path):
    model, made = crosses_over(*tokens(arch), arch, tmp_path)
    assert model.get_nb_trainable_parameters()[0] == made.get_nb_trainable_parameters()[0] == len(CHOSEN) * 16


def test_trainable_tokens_of_a_classifier(tmp_path):
    """PEFT's config has no `modules_to_save`: it neither trains nor reads the head, which is the base's to it."""
    their_config, our_config = tokens("bert", task_type=None)
    crosses_over(their_config, our_config, "bert", tmp_path)


def lora(arch: str, **options):
    arguments = {"task_type": TASKS[arch], "r": 2, "target_modules": ATTENTION[arch][:1], **options}
    return peft.LoraConfig(**arguments), deltatune.LoraConfig(**arguments)


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "bert"])
def test_tokens_beside_lora(arch, tmp_path):
    model, made = crosses_over(*lora(arch, trainable_token_indices=CHOSEN), arch, tmp_path)
    assert model.get_nb_trainable_parameters()[0] == made.get_nb_trainable_parameters()[0]


def test_tokens_of_several_layers_beside_lora(tmp_path):
    crosses_over(*lora("gpt2", trainable_token_indices={"wte": [5, 3], "wpe": [0, 1, 2]}), "gpt2", tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_tokens_with_random_options(seed, tmp_path):
    draw = random.Random(seed)
    arch = draw.choice(ARCHITECTURES)
    chosen = draw.sample(range(3, 61), draw.randint(2, 30))
    if draw.random() < 0.5:
        crosses_over(*tokens(arch, token_indices=chosen, init_weights=draw.random() < 0.5), arch, tmp_path)
    else:
        whole = {"modules_to_save": ["norm"]} if arch == "llama" else {}
        crosses_over(*lora(arch, trainable_token_indices=chosen, **whole), arch, tmp_path)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_training_of_tokens(arch, tmp_path):
    chosen = list(range(3, 40))
    trains_alike(tokens(arch, token_indices=chosen)[0], arch, tmp_path / "alone")
    trains_alike(lora(arch, trainable_token_indices=chosen)[0], arch, tmp_path / "lora")


def test_both_ends_of_a_tied_model_named():
    """PEFT wraps the embedding twice then, and cannot call the result; here it is the same as the embedding alone."""
    their_config, our_config = tokens("gpt2", target_modules=["wte", "lm_head"])
    with pytest.raises(ValueError, match="unknown layer type"):
        logits(theirs("gpt2", their_config), batch("gpt2"))
    ours = scatter(deltatune.get_peft_model(tiny("gpt2"), our_config), 3)
    alone = scatter(deltatune.get_peft_model(tiny("gpt2"), tokens("gpt2")[1]), 3)
    assert torch.equal(logits(ours, batch("gpt2")), logits(alone, batch("gpt2")))


def test_the_head_alone_of_a_tied_model(tmp_path):
    crosses_over(*tokens("gpt2", target_modules=["lm_head"]), "gpt2", tmp_path)


def test_merged_tokens_agree(tmp_path):
    model, inputs = theirs("gpt2", tokens("gpt2")[0]), batch("gpt2")
    ours = deltatune.PeftModel.from_pretrained(tiny("gpt2"), saved_by_peft(model, tmp_path))
    assert_close(logits(ours.merge_and_unload(), inputs), logits(model.merge_and_unload(), inputs), **EXACT)


@pytest.mark.parametrize("config", [deltatune.BitFitConfig(), deltatune.DiffPruningConfig(prune_step=9)])
def test_peft_reads_no_file_of_a_method_that_it_lacks(config, tmp_path):
    """It says so instead of reading something else."""
    model = scatter(deltatune.get_peft_model(tiny("gpt2"), config), 3)
    model.save_pretrained(tmp_path)
    with pytest.raises(KeyError, match=config.peft_type.value):
        peft.PeftModel.from_pretrained(tiny("gpt2"), tmp_path)


def norms(arch: str, **options):
    arguments = {"task_type": TASKS[arch], **options}
    return peft.LNTuningConfig(**arguments), deltatune.LNTuningConfig(**arguments)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_ln_tuning_of_the_usual_norms(arch, tmp_path):
    model, made = crosses_over(*norms(arch), arch, tmp_path)
    assert model.get_nb_trainable_parameters()[0] == made.get_nb_trainable_parameters()[0]


NAMES = {  # layers of every kind, square ones among them
    "gpt2": ["wte", "wpe", "ln_1", "ln_f", "c_attn", "c_proj", "lm_head"],
    "llama": ["embed_tokens", "input_layernorm", "q_proj", "k_proj", "down_proj", "norm"],
    "bert": ["LayerNorm", "query", "dense", "word_embeddings"],
    "bart": ["fc1", "q_proj", "final_layer_norm", "embed_positions"],
}


@pytest.mark.parametrize("seed", range(4))
def test_ln_tuning_of_any_layers(seed, tmp_path):
    draw = random.Random(seed)
    arch = draw.choice(sorted(NAMES))
    options = {"target_modules": draw.sample(NAMES[arch], draw.randint(2, 4))}
    if draw.random() < 0.5:
        options["exclude_modules"] = r".*\.0\..*"
    if arch == "bert":
        options["task_type"] = None
    crosses_over(*norms(arch, **options), arch, tmp_path)


def test_ln_tuning_of_a_classifier(tmp_path):
    crosses_over(*norms("bert", target_modules=["LayerNorm"]), "bert", tmp_path)


def test_ln_tuning_of_convolutions(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 4, 2)).eval()

    x = torch.randn(2, 4, 6, 6)
    config = {"target_modules": ["0", "1", "2"]}
    model = scatter(peft.get_peft_model(base(), peft.LNTuningConfig(**config)), 3)
    ours = deltatune.PeftModel.from_pretrained(base(), saved_by_peft(model, tmp_path / "theirs"))
    assert_close(ours(x), model(x), **EXACT)
    ours.save_pretrained(tmp_path / "ours")
    assert_close(loaded_by_peft(base(), tmp_path / "ours")(x), model(x), **EXACT)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_training_of_norms(arch, tmp_path):
    trains_alike(norms(arch)[0], arch, tmp_path)
