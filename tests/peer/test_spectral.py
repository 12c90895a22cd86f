"""C3A, FourierFT, WaveFT, PEANuT and SHiRA beside PEFT's: files both ways, training from the same start."""

import random

import pytest
import torch
from torch.testing import assert_close

import deltatune
from tests.core.tiny import TASKS, batch, logits, tiny
from tests.peer import crossing
from tests.peer.pairs import ATTENTION, WHOLE, loaded_by_peft, peft, scatter

quiet = pytest.mark.filterwarnings("ignore:.*match no module:deltatune.PeftWarning")
NAMES = {
    "c3a": "C3AConfig",
    "fourierft": "FourierFTConfig",
    "waveft": "WaveFTConfig",
    "peanut": "PeanutConfig",
    "shira": "ShiraConfig",
}
LEARNING_RATES = {"c3a": 0.1, "fourierft": 0.1}
SIZES = {
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 40},
    "waveft": {"n_frequency": 40, "scaling": 3.0},
    "peanut": {"r": 4},
    "shira": {"r": 3},
}
# PEFT's C3A, PEANuT and SHiRA do not know Conv1D, of which GPT-2 is made
ARCHITECTURES = {
    "c3a": ("llama", "bert", "t5"),
    "fourierft": ("llama", "bert", "gpt2"),
    "waveft": ("llama", "t5", "gpt2"),
    "peanut": ("llama", "bert", "t5"),
    "shira": ("llama", "bert", "t5"),
}
PAIRS = [(method, arch) for method, archs in ARCHITECTURES.items() for arch in archs]


def configs(method, arch, **options):
    arguments = {"task_type": TASKS[arch], **SIZES[method], **options}
    return getattr(peft, NAMES[method])(**arguments), getattr(deltatune, NAMES[method])(**arguments)


def crosses_over(method, arch, tmp_path, **options):
    return crossing.crosses_over(*configs(method, arch, **options), arch, tmp_path)


@quiet
@pytest.mark.parametrize("method,arch", PAIRS)
def test_usual_targets(method, arch, tmp_path):
    crosses_over(method, arch, tmp_path)


@pytest.mark.parametrize("method", NAMES)
def test_twenty_steps(method, tmp_path):
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    if method == "c3a":  # layers with nothing trained before them, see the next test
        targets = {"target_modules": ["q_proj", "k_proj", "v_proj"], "layers_to_transform": [0]}
    config, _ = configs(method, "llama", **targets)
    crossing.trains_alike(config, "llama", tmp_path, lr=LEARNING_RATES.get(method, 3e-3))


def test_pefts_c3a_hands_a_wrong_gradient_to_the_layers_before_it():
    """Its own backward turns the blocks the wrong way; ours is that of the matrix of which both are the product."""
    from peft.tuners.c3a.utils import BlockCircularConvolution, get_circulant_fast

    from deltatune.factors import circulant, correlate

    torch.manual_seed(0)
    kernel = torch.randn(2, 3, 5, dtype=torch.float64)
    x = torch.randn(4, 15, dtype=torch.float64, requires_grad=True)
    assert_close(circulant(kernel), get_circulant_fast(kernel))
    products = [x @ circulant(kernel).T, correlate(x, kernel), BlockCircularConvolution.apply(x, kernel)]
    right, ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in products)
    assert_close(ours, right)
    assert_close(products[2], products[0])
    assert not torch.allclose(theirs, right), "PEFT is right by now: train more layers in the test above"


def drawn(arch, seed):
    """Options that all of these methods have."""
    draw = random.Random(f"{arch}{seed}")
    options = {"target_modules": sorted(draw.sample(ATTENTION[arch], draw.randint(1, 3)))}
    if draw.random() < 0.4:
        options["layers_to_transform"] = draw.choice([[1], 0, [0, 1]])
    if draw.random() < 0.3:
        options["modules_to_save"] = WHOLE[arch]
    return options, draw


@pytest.mark.parametrize("arch,seed", [("llama", 0), ("llama", 1), ("bert", 2), ("t5", 3)])
def test_c3a_with_random_options(arch, seed, tmp_path):
    options, draw = drawn(arch, seed)
    options["block_size"] = draw.choice([1, 2, 4, 8])
    options["init_weights"] = draw.choice([True, False, "gaussian", "kaiming_uniform", "xavier_uniform"])
    if draw.random() < 0.7:
        options["block_size_pattern"] = {options["target_modules"][0]: draw.choice([2, 4])}
    crosses_over("c3a", arch, tmp_path, **options)


@pytest.mark.parametrize("arch,seed", [("llama", 0), ("llama", 1), ("gpt2", 2), ("t5", 3)])
def test_fourierft_with_random_options(arch, seed, tmp_path):
    options, draw = drawn(arch, seed)
    options |= {"n_frequency": draw.choice([1, 7, 100]), "scaling": draw.choice([150, 30.0])}
    options |= {"random_loc_seed": draw.choice([0, 777, 123456789]), "init_weights": draw.random() < 0.5}
    if draw.random() < 0.7:
        options["n_frequency_pattern"] = {options["target_modules"][0]: draw.choice([12, 60])}
    if draw.random() < 0.5:
        options["exclude_modules"] = r".*\.1\..*"
        options.pop("layers_to_transform", None)
    crosses_over("fourierft", arch, tmp_path, **options)


@pytest.mark.parametrize("arch,seed", [("llama", 0), ("bert", 1), ("gpt2", 2), ("t5", 3), ("llama", 4), ("gpt2", 5)])
def test_waveft_with_random_options(arch, seed, tmp_path):
    options, draw = drawn(arch, seed)
    options |= {"n_frequency": draw.choice([7, 100]), "scaling": draw.choice([5, 3.0])}
    options |= {"random_loc_seed": draw.choice([0, 777]), "init_weights": draw.random() < 0.5}
    options |= {"wavelet_family": draw.choice(["db1", "db4", "sym5", "coif2"]), "use_idwt": draw.random() < 0.8}
    options["proportional_parameters"] = draw.random() < 0.5
    if draw.random() < 0.5:
        options["n_frequency_pattern"] = {options["target_modules"][0]: draw.choice([12, 60])}
    crosses_over("waveft", arch, tmp_path, **options)


@pytest.mark.parametrize("family", [f"db{n}" for n in range(1, 11)] + [f"sym{n}" for n in range(2, 11)]
                         + [f"coif{n}" for n in range(1, 4)])  # fmt: skip
def test_every_wavelet_is_pefts(family):
    from peft.tuners.waveft.wavelet import Wavelet

    from deltatune.wavelets import filters

    theirs = torch.tensor([Wavelet(family).rec_lo, Wavelet(family).rec_hi], dtype=torch.float64)
    assert_close(filters(family), theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["coif4", "coif5"])
def test_what_peft_calls_by_these_names_is_no_wavelet(family):
    from peft.tuners.waveft.wavelet import Wavelet

    low = torch.tensor(Wavelet(family).rec_lo)
    assert abs(low @ low - 1) > 1e-3, "PEFT has mended it: allow it here"
    with pytest.raises(deltatune.PeftError, match=family):
        deltatune.WaveFTConfig(wavelet_family=family)


@pytest.mark.parametrize("arch,seed", [("llama", 0), ("bert", 1), ("llama", 2), ("t5", 3)])
def test_peanut_with_random_options(arch, seed, tmp_path):
    options, draw = drawn(arch, seed)
    options |= {"r": draw.choice([1, 3, 32]), "depth": draw.choice([0, 1, 3]), "init_weights": draw.random() < 0.5}
    options |= {"act_fn": draw.choice(["relu", "tanh", "silu"]), "scaling": draw.choice([0.5, 1.0])}
    crosses_over("peanut", arch, tmp_path, **options)


def test_activations_are_those_of_transformers():
    from transformers.activations import ACT2FN

    from deltatune.methods.peanut import ACTIVATIONS

    x = torch.linspace(-12, 12, 97)
    assert {*ACT2FN} - {*ACTIVATIONS} <= {"prelu", "xielu"}, "they have parameters of their own"
    for name, act in ACTIVATIONS.items():
        assert_close(act(x), ACT2FN[name](x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch,seed", [("llama", 0), ("bert", 1), ("t5", 2), ("llama", 3)])
def test_shira_with_random_options(arch, seed, tmp_path):
    options, draw = drawn(arch, seed)
    options.pop("layers_to_transform", None)  # PEFT's ShiraConfig lacks it
    options |= {"r": draw.choice([1, 4]), "random_seed": draw.choice([None, 0, 77])}
    options["init_weights"] = draw.random() < 0.5
    crosses_over("shira", arch, tmp_path, **options)


def largest(base_layer, r, **kwargs):
    """A mask of the largest entries."""
    weight = base_layer.weight.detach()
    mask = torch.zeros(weight.numel())
    mask[weight.abs().flatten().topk(r * sum(weight.shape)).indices] = 1
    return mask.view(weight.shape)


def test_shira_with_a_mask_of_ones_own(tmp_path):
    """Files hold the places then, and neither side needs the function to read them."""
    with pytest.warns(UserWarning, match="mask_type"):
        their_config, our_config = configs("shira", "llama", target_modules=["q_proj"], mask_type="largest")
    their_config.mask_fn = our_config.mask_fn = largest
    crossing.crosses_over(their_config, our_config, "llama", tmp_path)


def test_options_that_pefts_shira_lacks_are_resolved_into_targets(tmp_path):
    """`layers_to_transform` is written as the full names, so that the file means the same to PEFT."""
    config = deltatune.ShiraConfig(
        r=2, target_modules=["q_proj"], layers_to_transform=[1], exclude_modules=["k_proj"], task_type="CAUSAL_LM"
    )
    ours = scatter(deltatune.get_peft_model(tiny("llama"), config), 3)
    ours.save_pretrained(tmp_path)
    theirs = loaded_by_peft(tiny("llama"), tmp_path)
    assert_close(logits(theirs, batch("llama")), logits(ours, batch("llama")), **crossing.EXACT)
