"""Methods whose layers share tensors, against PEFT 0.21.2: files both ways, training from the same start."""

import json
import random
import re

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import deltatune
from tests.core.tiny import TASKS, batch, logits, tiny
from tests.peer.crossing import EXACT, crosses_over, trains_alike
from tests.peer.pairs import ATTENTION, EMBEDDING, loaded_by_peft, saved_by_peft, scatter, theirs

pytestmark = pytest.mark.filterwarnings("ignore:.*match no module:deltatune.PeftWarning")
CONFIGS = {
    "vera": "VeraConfig",
    "pvera": "PveraConfig",
    "randlora": "RandLoraConfig",
    "vblora": "VBLoRAConfig",
    "unilora": "UniLoraConfig",
    "tinylora": "TinyLoraConfig",
}
REPEATING = ("randlora",)  # PEFT's files hold the projections once per layer too, and it warns where they do not
PROJECTED = ("vera", "pvera", "randlora")  # methods with random projections, and what they are called
TENSORS = {"vera": ["vera_A", "vera_B"], "pvera": ["pvera_A", "pvera_B"], "randlora": ["randlora_A", "randlora_B"]}


def configs(method, arch, **options):
    """PEFT's config and ours; PEFT's is quiet about what its files then lack."""
    arguments = {"task_type": TASKS[arch], **options}
    return getattr(peft, CONFIGS[method])(**arguments), getattr(deltatune, CONFIGS[method])(**arguments)


def drawn(method, arch, seed):
    draw = random.Random(f"{method}{arch}{seed}")
    options = {"target_modules": sorted(draw.sample(ATTENTION[arch], draw.randint(1, 3))), "r": draw.choice([1, 3, 8])}
    options["projection_prng_key"] = draw.choice([0, 7, 123])
    if method in ("vera", "pvera") and draw.random() < 0.5:
        options["d_initial"] = draw.choice([0.01, 1.0])
    if method == "randlora":
        options["randlora_alpha"] = draw.choice([1, 5])
        options[draw.choice(["sparse", "very_sparse", "init_weights"])] = True
    if draw.random() < 0.3:
        options["layers_to_transform"] = draw.choice([[1], 0, [0, 1]])
    if draw.random() < 0.3:
        options["init_weights"] = False
    return options


@pytest.mark.filterwarnings("ignore:.*projections|.*vera_A")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("arch", ATTENTION)
@pytest.mark.parametrize("method", PROJECTED)
def test_random_options_cross_over(method, arch, seed, tmp_path):
    their_config, our_config = configs(method, arch, **drawn(method, arch, seed))
    if method in REPEATING:
        their_config.save_projection = False
    their_model, our_model = crosses_over(their_config, our_config, arch, tmp_path)
    assert their_model.get_nb_trainable_parameters()[0] == our_model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("method", PROJECTED)
def test_projections_are_drawn_as_pefts(method):
    their_config, our_config = configs(method, "llama", r=5, projection_prng_key=3, target_modules="all-linear")
    made, ours = theirs("llama", their_config), deltatune.get_peft_model(tiny("llama"), our_config)
    for name in TENSORS[method]:
        expected = getattr(made.base_model, name)["default"]
        assert torch.equal(ours.get_base_model().shared_by_adapters["default"].get_buffer(name), expected)


@pytest.mark.filterwarnings("ignore:Specified to not load")
@pytest.mark.parametrize("method", PROJECTED)
def test_saved_projections_are_optional_and_believed(method, tmp_path):
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    model, inputs = theirs("llama", configs(method, "llama", **options)[0]), batch("llama")
    for name in TENSORS[method]:  # as if drawn on a machine whose generator gives other numbers
        getattr(model.base_model, name)["default"].mul_(1.5)
    saved_by_peft(model, tmp_path / "theirs")
    ours = deltatune.PeftModel.from_pretrained(tiny("llama"), tmp_path / "theirs")
    assert_close(logits(ours, inputs), logits(model, inputs), **EXACT)
    ours.save_pretrained(tmp_path / "again")
    held = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert {f"base_model.{name}" for name in TENSORS[method]} <= held.keys()
    if method in REPEATING:
        with pytest.warns(UserWarning, match="missing adapter keys") as caught:
            again = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "again").eval()
        told = next(str(warning.message) for warning in caught if "missing adapter keys" in str(warning.message))
        missing = re.findall(r"'(base_model[^']*)'", told)
        assert all(key.split(".")[-2] in TENSORS[method] for key in missing), "no more than the repetitions"
    else:
        again = loaded_by_peft(tiny("llama"), tmp_path / "again")
    assert_close(logits(again, inputs), logits(model, inputs), **EXACT)

    small = scatter(deltatune.get_peft_model(tiny("llama"), configs(method, "llama", **options)[1]), 11)
    small.save_pretrained(tmp_path / "small")
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_text())["save_projection"] is False
    held = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert not any(key.endswith(tuple(TENSORS[method])) for key in held)
    assert_close(logits(loaded_by_peft(tiny("llama"), tmp_path / "small"), inputs), logits(small, inputs), **EXACT)


@pytest.mark.parametrize("arch", ["llama", "bert"])
@pytest.mark.parametrize("method", PROJECTED)
def test_training_gives_pefts_losses(method, arch, tmp_path):
    # RandLoRA's usual scale, alpha = 640, makes so small a model chaotic
    options = {"randlora": {"randlora_alpha": 2}, "pvera": {"generator_seed": 3}}.get(method, {})
    trains_alike(configs(method, arch, r=8, target_modules=ATTENTION[arch][:3], **options)[0], arch, tmp_path)


@pytest.mark.parametrize("method", CONFIGS)
def test_the_table_of_usual_layers_is_pefts(method):
    table = getattr(peft.utils.constants, f"TRANSFORMERS_MODELS_TO_{method.upper()}_TARGET_MODULES_MAPPING")
    usual = deltatune.METHODS[deltatune.PeftType(method.upper())].default_targets
    for model_type, expected in table.items():
        found = usual(model_type)
        assert found is not None, model_type
        assert found == expected or set(found) == set(expected), model_type


@pytest.mark.parametrize("method", CONFIGS)
def test_options_and_defaults_are_pefts(method):
    """All but what says whether derived tensors are saved; and what PEFT's config lacks never reaches a file."""
    theirs, ours = (getattr(library, CONFIGS[method])() for library in (peft, deltatune))
    lacking = ours.to_dict().keys() - theirs.to_dict().keys()
    assert lacking == set(ours.beyond_peer) and theirs.to_dict().keys() <= ours.to_dict().keys()
    for name, value in theirs.to_dict().items():
        if name not in ("save_projection", "peft_type", "auto_mapping"):
            assert getattr(ours, name) == value, name


def drawn_bank(arch, seed):
    draw = random.Random(f"vblora{arch}{seed}")
    names = sorted(draw.sample([name for name in ATTENTION[arch] if name != "k_proj"], draw.randint(1, 3)))
    options = {"target_modules": names, "r": draw.choice([1, 3]), "vector_length": draw.choice([2, 8])}
    options |= {"num_vectors": draw.choice([5, 300]), "topk": draw.choice([1, 2, 4])}
    options |= {"init_vector_bank_bound": 1.0, "save_only_topk_weights": draw.random() < 0.5}
    return options


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("arch", ATTENTION)
def test_banks_cross_over(arch, seed, tmp_path):
    their_model, our_model = crosses_over(*configs("vblora", arch, **drawn_bank(arch, seed)), arch, tmp_path)
    assert their_model.get_nb_trainable_parameters()[0] == our_model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_training_a_bank_gives_pefts_losses(arch, tmp_path):
    options = {"r": 2, "num_vectors": 6, "vector_length": 8, "target_modules": ATTENTION[arch][:3]}
    trains_alike(configs("vblora", arch, **options)[0], arch, tmp_path)


def drawn_numbers(arch, seed):
    draw = random.Random(f"unilora{arch}{seed}")
    options = {"target_modules": sorted(draw.sample(ATTENTION[arch], draw.randint(1, 3))), "r": draw.choice([1, 3])}
    options |= {"theta_d_length": draw.choice([7, 64, 100_000]), "proj_seed": draw.choice([0, 42])}
    options |= {"init_weights": draw.random() < 0.5, "save_indices": draw.random() < 0.5}
    if draw.random() < 0.4:
        options["layers_to_transform"] = draw.choice([[1], 0])
    return options


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("arch", ATTENTION)
def test_one_vector_crosses_over(arch, seed, tmp_path):
    their_model, our_model = crosses_over(*configs("unilora", arch, **drawn_numbers(arch, seed)), arch, tmp_path)
    assert their_model.get_nb_trainable_parameters()[0] == our_model.get_nb_trainable_parameters()[0]


def test_places_that_a_file_holds_are_believed(tmp_path):
    options = {"r": 2, "theta_d_length": 50, "target_modules": ["q_proj", "down_proj"], "save_indices": True}
    model, inputs = theirs("llama", configs("unilora", "llama", **options)[0]), batch("llama")
    for layer in model.modules():  # as if another NumPy had shuffled
        if isinstance(layer, peft.tuners.unilora.layer.UniLoraLayer):
            for indices, scales in (("indices_A", "scales_A"), ("indices_B", "scales_B")):
                for name in (indices, scales):
                    buffer = getattr(layer, f"unilora_{name}")["default"]
                    buffer.copy_(buffer.flip(0, 1).clone())
    ours = deltatune.PeftModel.from_pretrained(tiny("llama"), saved_by_peft(model, tmp_path / "theirs"))
    assert_close(logits(ours, inputs), logits(model, inputs), **EXACT)
    ours.save_pretrained(tmp_path / "again")
    assert_close(logits(loaded_by_peft(tiny("llama"), tmp_path / "again"), inputs), logits(model, inputs), **EXACT)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_training_one_vector_gives_pefts_losses(arch, tmp_path):
    options = {"r": 4, "theta_d_length": 200, "target_modules": ATTENTION[arch][:3]}
    trains_alike(configs("unilora", arch, **options)[0], arch, tmp_path)


def drawn_singular(method, arch, seed):
    draw = random.Random(f"{method} {arch} {seed}")
    names = sorted(draw.sample(ATTENTION[arch], draw.randint(2, 3))) + ([EMBEDDING[arch]] if seed % 2 else [])
    options = {"target_modules": names, "r": draw.choice([2, 5]), "u": draw.choice([4, 10])}
    options |= {"weight_tying": draw.choice([0.0, 0.3, 0.5, 1.0]), "projection_seed": draw.choice([0, 42])}
    return options | {"init_weights": draw.choice([True, "uniform"])}


@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("arch", ATTENTION)
def test_tiny_vectors_cross_over(arch, seed, tmp_path):
    """Ours without A, B and P too: PEFT says that it misses A and B, of which it makes the same."""
    their_config, our_config = configs("tinylora", arch, **drawn_singular("tinylora", arch, seed))
    their_model, small = crosses_over(their_config, our_config, arch, tmp_path, back=False)
    assert their_model.get_nb_trainable_parameters()[0] == small.get_nb_trainable_parameters()[0]
    inputs = batch(arch)
    assert_close(logits(loaded_by_peft(tiny(arch), tmp_path / "again"), inputs), logits(their_model, inputs), **EXACT)
    small.save_pretrained(tmp_path / "small")
    held = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert all(key.startswith("base_model.tinylora_v.") or "classifier" in key or "score" in key for key in held)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        again = peft.PeftModel.from_pretrained(tiny(arch), tmp_path / "small").eval()
    assert_close(logits(again, inputs), logits(small, inputs), **EXACT)


@pytest.mark.filterwarnings("ignore:Specified to not")
def test_matrices_without_their_projection_are_read(tmp_path):
    options = {"r": 3, "u": 5, "target_modules": ["q_proj", "down_proj"], "save_projection": False}
    crosses_over(*configs("tinylora", "llama", **options), "llama", tmp_path, back=False)


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_training_tiny_vectors_gives_pefts_losses(arch, tmp_path):
    options = {"r": 2, "u": 8, "weight_tying": 0.5, "target_modules": ATTENTION[arch][:3]}
    trains_alike(configs("tinylora", arch, **options)[0], arch, tmp_path)
