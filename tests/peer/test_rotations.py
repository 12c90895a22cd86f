"""Methods that rotate, beside PEFT 0.21.2: RoAd, BOFT, OFT, PSOFT, DEFT."""

import random

import pytest
import torch
from torch.testing import assert_close

import deltatune
from tests.core.tiny import TASKS, tiny
from tests.peer import crossing
from tests.peer.pairs import ATTENTION, EMBEDDING, loaded_by_peft, peft, saved_by_peft, scatter

KINDS = ("RoadConfig", "BOFTConfig", "OFTConfig", "PsoftConfig", "DeftConfig")
pytestmark = pytest.mark.filterwarnings(  # PEFT, of its missing extension
    "ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly_factor", "ignore:Invalid `"
)
quiet = pytest.mark.filterwarnings("ignore:.*match no module:deltatune.PeftWarning")


def both(kind, arch, **options):
    """PEFT's config and ours from the same arguments."""
    arguments = {"task_type": TASKS[arch], **options}
    return getattr(peft, kind)(**arguments), getattr(deltatune, kind)(**arguments)


def crosses_over(kind, arch, folder, back=True, **options):
    return crossing.crosses_over(*both(kind, arch, **options), arch, folder, back=back)


def trains_alike(kind, arch, folder, **options):
    crossing.trains_alike(both(kind, arch, **options)[0], arch, folder)


def between_convolutions(kind, kernel, folder, **options):
    """Like `crosses_over`, on two convolutions."""
    arguments = {"target_modules": ["0", "2"], **options}

    def base():
        torch.manual_seed(0)
        first, second = torch.nn.Conv2d(4, 8, kernel, stride=2, padding=1), torch.nn.Conv2d(8, 6, kernel, bias=False)
        return torch.nn.Sequential(first, torch.nn.Tanh(), second).eval()

    x = torch.randn(2, 4, 9, 9)
    model = scatter(peft.get_peft_model(base(), getattr(peft, kind)(**arguments)), 3)
    ours = deltatune.PeftModel.from_pretrained(base(), saved_by_peft(model, folder / "theirs"))
    assert_close(ours(x), model(x), **crossing.EXACT)
    made = scatter(deltatune.get_peft_model(base(), getattr(deltatune, kind)(**arguments)), 4)
    made.save_pretrained(folder / "ours")
    assert_close(loaded_by_peft(base(), folder / "ours")(x), made(x), **crossing.EXACT)


def some_layers(arch, draw):
    return sorted(draw.sample(ATTENTION[arch], draw.randint(1, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_fields_and_defaults_are_pefts(kind):
    ours, theirs = getattr(deltatune, kind)().to_dict(), getattr(peft, kind)().to_dict()
    beyond = getattr(deltatune, kind).beyond_peer | getattr(deltatune, kind).unsaved
    differing = {key: (ours.get(key), value) for key, value in theirs.items() if key not in ours or ours[key] != value}
    assert differing == {} and set(ours) - set(theirs) == beyond


# ---------------------------------------------------------------------------------------------------------------- RoAd


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("arch", ["llama", "bert", "t5"])
def test_road(arch, seed, tmp_path):
    draw = random.Random(f"road{arch}{seed}")
    options = {"variant": draw.choice(["road_1", "road_2", "road_4"]), "group_size": draw.choice([2, 4, 8])}
    crosses_over("RoadConfig", arch, tmp_path, target_modules=some_layers(arch, draw), **options)


def test_road_with_fields_that_pefts_lacks(tmp_path):
    theirs, _ = both("RoadConfig", "llama", target_modules=["layers.1.self_attn.q_proj"], group_size=4)
    where = {"target_modules": ["q_proj"], "layers_to_transform": 1, "exclude_modules": ["lm_head"]}
    ours = deltatune.RoadConfig(task_type="CAUSAL_LM", group_size=4, **where)
    crossing.crosses_over(theirs, ours, "llama", tmp_path)


@pytest.mark.parametrize("variant", ["road_1", "road_4"])
def test_training_road(variant, tmp_path):
    trains_alike("RoadConfig", "bert", tmp_path, target_modules=ATTENTION["bert"], variant=variant, group_size=8)


# ---------------------------------------------------------------------------------------------------------------- BOFT


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_boft(arch, seed, tmp_path):
    draw = random.Random(f"boft{arch}{seed}")
    size = draw.choice([2, 4, 8])
    options = draw.choice([{"boft_block_size": size}, {"boft_block_size": 0, "boft_block_num": size}])
    crosses_over("BOFTConfig", arch, tmp_path, target_modules=some_layers(arch, draw), **options)


def test_boft_without_its_extension_computes_with_one_factor_whatever_is_asked(tmp_path):
    """Such files mean what PEFT computed; it cannot read ours, which hold what was asked for."""
    options = {"target_modules": ["q_proj", "down_proj"], "boft_n_butterfly_factor": 3, "boft_block_size": 2}
    their_model, our_model = crosses_over("BOFTConfig", "llama", tmp_path, back=False, **options)
    shapes = [model.get_nb_trainable_parameters()[0] for model in (their_model, our_model)]
    assert shapes[0] < shapes[1]
    our_model.save_pretrained(tmp_path / "ours")
    with pytest.raises(RuntimeError, match=r"size mismatch for .*boft_R"):
        loaded_by_peft(tiny("llama"), tmp_path / "ours")


def their_rotation(factors, size, count, blocks):
    """R as PEFT multiplies it out where its extension is there: here with a block-diagonal of torch's instead."""
    from peft.tuners.boft.layer import Linear

    layer, width = Linear.__new__(Linear), size * count
    R = torch.eye(width)
    for order in range(factors):
        order_of = layer.block_butterfly_perm(width, count // 2**order, size // 2, factors - 1)
        P = layer.perm2mat(order_of)
        R = P @ torch.block_diag(*layer.cayley_batch(blocks[order])) @ P.T @ R
    return R


@pytest.mark.parametrize("factors,size,count", [(1, 3, 5), (2, 4, 6), (3, 2, 8), (4, 6, 8)])
def test_the_butterfly_is_pefts(factors, size, count):
    config = deltatune.BOFTConfig(target_modules=["0"], boft_block_size=size, boft_n_butterfly_factor=factors)
    model = scatter(deltatune.get_peft_model(torch.nn.Sequential(torch.nn.Linear(size * count, 3)), config), 5)
    boft = model.get_base_model()[0].adapters["default"]
    expected = their_rotation(factors, size, count, boft.boft_R.detach())
    assert_close(boft.rotate(torch.eye(size * count)), expected, **crossing.EXACT)


@pytest.mark.parametrize("kernel", [1, 2])
def test_boft_on_convolutions(kernel, tmp_path):
    between_convolutions("BOFTConfig", kernel, tmp_path, boft_block_size=4)


def test_training_boft(tmp_path):
    trains_alike("BOFTConfig", "bert", tmp_path, target_modules=ATTENTION["bert"], boft_block_size=8)


# ----------------------------------------------------------------------------------------------------------------- OFT


@pytest.mark.parametrize(
    "options", [{}, {"block_share": True}, {"use_cayley_neumann": False}, {"coft": True, "eps": 0.5}], ids=str
)
@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_oft_on_embeddings(arch, options, tmp_path):
    targets = [EMBEDDING[arch], ATTENTION[arch][0]]
    crosses_over("OFTConfig", arch, tmp_path, target_modules=targets, oft_block_size=4, **options)


SIZES = [{"oft_block_size": 5}, {"oft_block_size": 18}, {"oft_block_size": 32}, {"oft_block_size": 0, "r": 7}]


@pytest.mark.parametrize("options", [*SIZES, {"oft_block_size": 10, "block_share": True}], ids=str)
def test_oft_with_sizes_that_do_not_divide(options, tmp_path):
    """PEFT adjusts them, by 16 and 24 inputs, and its files name the size that was asked for."""
    targets = ["q_proj", "down_proj", "embed_tokens"]
    theirs, ours = both("OFTConfig", "llama", target_modules=targets, use_cayley_neumann=False, **options)
    ours.adjust_size = True
    model, made = crossing.crosses_over(theirs, ours, "llama", tmp_path)
    assert made.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_oft_with_blocks_that_pefts_adjustment_makes_single(tmp_path):
    bare = lambda: torch.nn.Sequential(torch.nn.Linear(7, 6), torch.nn.Linear(6, 2)).requires_grad_(False)
    config = {"target_modules": ["0", "1"], "oft_block_size": 2}
    torch.manual_seed(0)
    model = scatter(peft.get_peft_model(bare(), peft.OFTConfig(**config)), 3)
    torch.manual_seed(0)
    ours = deltatune.PeftModel.from_pretrained(bare(), saved_by_peft(model, tmp_path))
    x = torch.randn(3, 7)
    assert_close(ours(x), model(x), **crossing.EXACT)


def test_training_oft_on_an_embedding(tmp_path):
    trains_alike("OFTConfig", "llama", tmp_path, target_modules=["embed_tokens", "q_proj"], oft_block_size=8)


# --------------------------------------------------------------------------------------------------------------- PSOFT


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("arch", ["llama", "bert", "t5"])
def test_psoft(arch, seed, tmp_path):
    draw = random.Random(f"psoft{arch}{seed}")
    options = {
        "r": draw.choice([2, 5, 8]),
        "psoft_alpha": draw.choice([1, 8, 32]),
        "ab_svd_init": draw.choice(["psoft_init", "pissa_init"]),
        "psoft_svd": draw.choice(["full", "lowrank"]),
        "random_seed": draw.randint(0, 3),
        "psoft_orth": draw.random() < 0.7,
        "psoft_mag_a": draw.random() < 0.7,
        "psoft_mag_b": draw.random() < 0.7,
    }
    if draw.random() < 0.5:
        more = {"num_cayley_neumann_terms": draw.choice([3, 5]), "cayley_neumann_eps": draw.choice([None, 0.5])}
        options |= {"use_cayley_neumann": True, **more}
    crosses_over("PsoftConfig", arch, tmp_path, target_modules=some_layers(arch, draw), **options)


def test_training_psoft(tmp_path):
    trains_alike("PsoftConfig", "bert", tmp_path, target_modules=ATTENTION["bert"], r=8)


# ---------------------------------------------------------------------------------------------------------------- DEFT


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("arch", ["llama", "bert", "t5", "gpt2"])
def test_deft(arch, seed, tmp_path):
    draw = random.Random(f"deft{arch}{seed}")
    options = {
        "r": draw.choice([2, 5, 20]),  # at most the outputs, which are 8, 16 and more
        "alpha": draw.choice([None, 3, 16]),
        "decomposition_method": draw.choice(["relu", "qr"]),
        "para": draw.random() < 0.3,
        "init_weights": draw.random() < 0.5,
    }
    crosses_over("DeftConfig", arch, tmp_path, target_modules=some_layers(arch, draw), **options)


@pytest.mark.parametrize("options", [{}, {"decomposition_method": "qr", "alpha": 16}, {"para": True}], ids=str)
def test_training_deft(options, tmp_path):
    trains_alike("DeftConfig", "bert", tmp_path, target_modules=ATTENTION["bert"], r=4, **options)
