"""FRoD against PEFT 0.21.2: files both ways, training from the same start."""

import json
import random
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import deltatune
from deltatune.joint_bases import number, role
from deltatune.methods.frod import usual_targets
from tests.core.tiny import TASKS, batch, logits, tiny
from tests.peer.crossing import EXACT, crosses_over, trains_alike
from tests.peer.pairs import ATTENTION, loaded_by_peft, saved_by_peft, scatter, theirs

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*match no module:deltatune.PeftWarning", "ignore:fan_in_fan_out", "ignore:Specified to not load"
)


def configs(arch, **options):
    arguments = {"task_type": TASKS[arch], **options}
    return peft.FrodConfig(progressbar=False, **arguments), deltatune.FrodConfig(**arguments)


def drawn(arch, seed):
    draw = random.Random(f"{arch}{seed}")
    options = {"target_modules": sorted(draw.sample(ATTENTION[arch], draw.randint(1, 3)))}
    options["sparse_rate"] = draw.choice([0.01, 0.1, 0.5])
    options["projection_prng_key"] = draw.choice([0, 7, 123])
    options["regularization_alpha"] = draw.choice([1e-3, 0.1])
    options["save_projection"] = draw.random() < 0.5
    if draw.random() < 0.3:
        options["layers_to_transform"] = draw.choice([[1], 0, [0, 1]])
    if draw.random() < 0.3:
        options["init_weights"] = False
    return options


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("arch", ATTENTION)
def test_random_options_cross_over(arch, seed, tmp_path):
    their_model, our_model = crosses_over(*configs(arch, **drawn(arch, seed)), arch, tmp_path)
    assert their_model.get_nb_trainable_parameters()[0] == our_model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("arch", ATTENTION)
def test_bases_are_derived_as_pefts(arch):
    """In T5 a layer of the decoder takes the place of the encoder's of the same number, as there."""
    their_config, our_config = configs(arch, target_modules="all-linear", sparse_rate=0.05, projection_prng_key=3)
    made, ours = theirs(arch, their_config), deltatune.get_peft_model(tiny(arch), our_config)
    shared = ours.get_base_model().shared_by_adapters["default"]
    assert shared.names == sorted(made.base_model.frod_V)
    for name, basis in zip(shared.names, shared.bases):
        assert torch.equal(basis.V, made.base_model.frod_V[name]["default"]), name
        assert torch.equal(basis.places, made.base_model.frod_s_indices[name]["default"])
        assert torch.equal(basis.size, made.base_model.frod_s_size[name]["default"])
    for path, layer in deltatune.inject.adapted_layers(ours.get_base_model()):
        other = made.get_base_model().get_submodule(path)
        assert_close(layer.frod_U["default"], other.frod_U["default"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "path",
    [
        *("fc", "h.3.attn.c_attn", "model.layers.12.self_attn.q_proj", "bert.encoder.layer.11.attention.output.dense"),
        *("bert.encoder.layer.2.output.dense", "blocks.4", "encoder.block.1.layer.0.SelfAttention.q", "layers", "0"),
        *("tower.2.layers.7.mlp.fc1", "classifier.dense", "a.layers.x.3.q"),
    ],
)
def test_roles_and_numbers_are_pefts(path):
    assert role(path) == peft.tuners.frod.model._category_from_key(path)
    assert number(path, 99) == peft.tuners.frod.model._layer_index_from_key(path, 99)


def test_a_half_precision_base_crosses_over(tmp_path):
    """PEFT computes with all of U, S and V in bfloat16 where the base is, so the outputs agree to its precision."""
    their_config, _ = configs("llama", target_modules=["q_proj", "down_proj"])
    model = scatter(peft.get_peft_model(tiny("llama").bfloat16(), their_config), 3)
    saved_by_peft(model, tmp_path)
    ours = deltatune.PeftModel.from_pretrained(tiny("llama").bfloat16(), tmp_path)
    shared = ours.get_base_model().shared_by_adapters["default"]
    assert torch.equal(shared.bases[1].V, model.base_model.frod_V["self_attn_q_proj"]["default"].float())
    layer, other = (m.get_base_model().model.layers[0].self_attn.q_proj for m in (ours, model))
    U, V, S, diagonal = (
        part.detach() for part in other._get_frod_tensors("default", device="cpu", dtype=torch.float32)
    )
    assert_close(layer.stored_weight(["default"]), U @ (S.to_dense() + diagonal.diag()) @ V.T, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("believed", [True, False])
def test_saved_bases_are_believed(believed, tmp_path):
    """PEFT takes V from a file, but leaves U as it derived it here; with both from elsewhere W' is another matrix."""
    _, our_config = configs("llama", target_modules=["q_proj"], save_projection=True)
    model, inputs = scatter(deltatune.get_peft_model(tiny("llama"), our_config), 3), batch("llama")
    if believed:
        shared = model.get_base_model().shared_by_adapters["default"]
        shared.bases[0].V.mul_(torch.tensor([-1.0, 2.0]).repeat(8))  # as another machine might derive it, and scaled
        shared.fillings += 1
        for _, layer in deltatune.inject.adapted_layers(model.get_base_model()):
            layer.adapters["default"].settle(layer.as_map())
    model.save_pretrained(tmp_path / "ours")
    held = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    tops = {"frod_V.self_attn_q_proj", "frod_s_indices.self_attn_q_proj", "frod_s_size.self_attn_q_proj"}
    assert {f"base_model.{name}" for name in tops} <= held.keys()
    again = deltatune.PeftModel.from_pretrained(tiny("llama"), tmp_path / "ours")
    assert_close(logits(again, inputs), logits(model, inputs), **EXACT)
    there = loaded_by_peft(tiny("llama"), tmp_path / "ours")
    same = torch.allclose(logits(there, inputs), logits(model, inputs), rtol=1e-3, atol=1e-3)
    assert same is not believed
    again.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == held.keys()


def test_small_files_are_read_by_peft(tmp_path):
    """A basis that rounding decides is in the file all the same, which PEFT passes over with a warning."""
    _, our_config = configs("bert", target_modules=["query", "pooler.dense"])
    model, inputs = scatter(deltatune.get_peft_model(tiny("bert", num_hidden_layers=3), our_config), 3), batch("bert")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["save_projection"] is False
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert [key for key in held if key.startswith("base_model.frod")] == ["base_model.frod_V.pooler_dense"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = peft.PeftModel.from_pretrained(tiny("bert", num_hidden_layers=3), tmp_path).eval()
    assert_close(logits(there, inputs), logits(model, inputs), **EXACT)


@pytest.mark.parametrize("arch", ["llama", "bert", "gpt2"])
def test_training_gives_pefts_losses(arch, tmp_path):
    trains_alike(configs(arch, target_modules=ATTENTION[arch][:3], sparse_rate=0.05)[0], arch, tmp_path)


def test_the_table_of_usual_layers_and_the_defaults_are_pefts():
    for model_type, expected in peft.utils.TRANSFORMERS_MODELS_TO_FROD_TARGET_MODULES_MAPPING.items():
        assert set(usual_targets(model_type)) == set(expected), model_type
    theirs, ours = peft.FrodConfig().to_dict(), deltatune.FrodConfig()
    assert ours.to_dict().keys() - theirs.keys() == set(ours.beyond_peer) and theirs.keys() <= ours.to_dict().keys()
    for name, value in theirs.items():
        if name not in ("save_projection", "peft_type", "auto_mapping"):
            assert getattr(ours, name) == value, name
