"""Adapters cross over: what PEFT 0.21.2 wrote gives the same logits here, and ours give the same there."""

import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import deltatune
from deltatune.errors import PeftWarning
from tests.core.tiny import batch, logits, tiny
from tests.laws.examples import move
from tests.peer import crossing
from tests.peer.crossing import EXACT
from tests.peer.pairs import (
    ATTENTION,
    EMBEDDING,
    FEED_FORWARD,
    PAIRS,
    configs,
    drawn,
    loaded_by_peft,
    peft,
    saved_by_peft,
    scatter,
    theirs,
)

quiet = pytest.mark.filterwarnings("ignore:.*match no module:deltatune.PeftWarning")


def crosses_over(method, arch, tmp_path, **options):
    return crossing.crosses_over(*configs(method, arch, **options), arch, tmp_path)


@quiet
@pytest.mark.parametrize("method,arch", PAIRS)
def test_usual_targets(method, arch, tmp_path):
    # BERT's usual targets of IA3 hold the last layer before the head, whose width every block size divides
    crosses_over(method, arch, tmp_path)


@quiet
@pytest.mark.parametrize("method,arch", PAIRS)
def test_all_linear(method, arch, tmp_path):
    options = {"feedforward_modules": []} if method == "ia3" else {}
    crosses_over(method, arch, tmp_path, target_modules="all-linear", **options)


@quiet
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("arch", ATTENTION)
def test_lora_with_random_options(arch, seed, tmp_path):
    their_model, our_model = crosses_over("lora", arch, tmp_path, **drawn(arch, seed))
    assert their_model.get_nb_trainable_parameters() == our_model.get_nb_trainable_parameters()


@pytest.mark.parametrize("arch", FEED_FORWARD)
def test_ia3_with_feed_forward_layers(arch, tmp_path):
    ff = FEED_FORWARD[arch]
    crosses_over("ia3", arch, tmp_path, target_modules=[ATTENTION[arch][0], ff], feedforward_modules=[ff])


@pytest.mark.parametrize(
    "options",
    [
        {"coft": True, "eps": 0.1},
        {"block_share": True},
        {"use_cayley_neumann": False},
        {"r": 2, "oft_block_size": 0},
        {"num_cayley_neumann_terms": 2},
        {"num_cayley_neumann_terms": 3},
        {"num_cayley_neumann_terms": 7},
    ],
    ids=str,
)
def test_oft_options(options, tmp_path):
    crosses_over("oft", "llama", tmp_path, target_modules=["q_proj", "down_proj"], **options)


@pytest.mark.parametrize("options", [{"r": 3}, {"apply_GS": True}, {"init_weights": False}], ids=str)
def test_hra_options(options, tmp_path):
    crosses_over("hra", "llama", tmp_path, target_modules=["q_proj", "down_proj"], **options)


@quiet
@pytest.mark.parametrize("arch", ["gpt2", "llama", "bert"])
def test_lora_on_embeddings(arch, tmp_path):
    """PEFT puts a copy of the base's embedding into such a file, which is checked and not loaded."""
    crosses_over("lora", arch, tmp_path, target_modules=[EMBEDDING[arch], ATTENTION[arch][0]])


class Convolutions(nn.Module):
    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, kernel, stride=2, padding=1)
        self.second = nn.Conv2d(8, 6, kernel, bias=False)  # PEFT's adapters leave out the dilation
        self.line = nn.Conv1d(6, 8, kernel)

    def forward(self, x):
        x = self.second(torch.tanh(self.first(x)))
        return self.line(torch.tanh(x.flatten(2)))


@pytest.mark.parametrize("kernel", [1, 2])
@pytest.mark.parametrize("method", ["lora", "ia3", "oft", "hra"])
def test_convolutions(method, kernel, tmp_path):
    if method == "oft" and kernel > 1:
        pytest.skip("PEFT's OFT rotates unfolded patches in another order than its own merge does")
    sizes = {
        "lora": {"r": 4},
        "ia3": {"feedforward_modules": ["second"]},
        "oft": {"oft_block_size": 4},
        "hra": {"r": 4},
    }
    # PEFT's IA3, OFT and HRA do not know Conv1d
    options = {"target_modules": ["first", "second"] + (["line"] if method == "lora" else []), **sizes[method]}
    names = {"lora": "LoraConfig", "ia3": "IA3Config", "oft": "OFTConfig", "hra": "HRAConfig"}
    their_config, our_config = (getattr(library, names[method])(**options) for library in (peft, deltatune))

    def base():
        torch.manual_seed(0)
        return Convolutions(kernel).eval()

    x = torch.randn(2, 4, 9, 9)
    model = scatter(peft.get_peft_model(base(), their_config), 3)
    ours = deltatune.PeftModel.from_pretrained(base(), saved_by_peft(model, tmp_path / "theirs"))
    assert_close(ours(x), model(x), **EXACT)
    made = scatter(deltatune.get_peft_model(base(), our_config), 4)
    made.save_pretrained(tmp_path / "ours")
    assert_close(loaded_by_peft(base(), tmp_path / "ours")(x), made(x), **EXACT)


def test_grouped_convolutions_with_lora(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=4)).eval()

    x = torch.randn(2, 4, 6, 6)
    model = scatter(peft.get_peft_model(base(), peft.LoraConfig(target_modules=["0", "2"], r=4)), 3)
    ours = deltatune.PeftModel.from_pretrained(base(), saved_by_peft(model, tmp_path))
    assert_close(ours(x), model(x), **EXACT)


@quiet
@pytest.mark.parametrize("arch", ["gpt2", "bert"])
def test_the_keys_and_the_config_of_a_file_are_pefts(arch, tmp_path):
    from safetensors.torch import load_file

    their_config, our_config = configs("lora", arch)
    saved_by_peft(theirs(arch, their_config), tmp_path / "theirs")
    deltatune.get_peft_model(tiny(arch), our_config).save_pretrained(tmp_path / "ours")
    keys = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours")]
    assert {key: value.shape for key, value in keys[0].items()} == {key: value.shape for key, value in keys[1].items()}
    written = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")]
    for config in written:
        config["target_modules"] = sorted(config["target_modules"])
        config.pop("fan_in_fan_out")  # PEFT notes the layout of Conv1D here; we read it off the layer
    assert written[1] == written[0]


def test_an_unknown_key_in_a_file_of_pefts_is_kept_and_saved_again(tmp_path):
    their_config, _ = configs("lora", "gpt2")
    folder = saved_by_peft(theirs("gpt2", their_config), tmp_path / "theirs")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_the_future": {"a": [1, 2]}}))
    with pytest.warns(PeftWarning, match=r"of_the_future.*kept"):
        model = deltatune.PeftModel.from_pretrained(tiny("gpt2"), folder)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["of_the_future"] == {"a": [1, 2]}
    with pytest.warns(PeftWarning, match="of_the_future"):
        deltatune.PeftModel.from_pretrained(tiny("gpt2"), tmp_path / "again")


def test_state_dicts_are_exchanged_without_files():
    their_config, our_config = configs("lora", "llama")
    model, inputs = theirs("llama", their_config), batch("llama")
    ours = deltatune.get_peft_model(tiny("llama"), our_config)
    result = deltatune.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(model))
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert_close(logits(ours, inputs), logits(model, inputs), **EXACT)
    move(ours)
    peft.set_peft_model_state_dict(model, deltatune.get_peft_model_state_dict(ours))
    assert_close(logits(ours, inputs), logits(model, inputs), **EXACT)


@pytest.mark.parametrize("arch", ["t5", "bert"])
def test_merged_models_agree(arch):
    their_config, our_config = configs("lora", arch, target_modules="all-linear", modules_to_save=None)
    model, inputs = theirs(arch, their_config), batch(arch)
    ours = deltatune.get_peft_model(tiny(arch), our_config)
    deltatune.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(model))
    merged = [logits(m.merge_and_unload(), inputs) for m in (model, ours)]
    assert_close(merged[1], merged[0], **EXACT)
