"""FourierFT against arXiv 2405.03003, equations (2) to (4): W' = W + alpha Re(F^-1(S)), with F^-1 as numpy has it."""

import cmath
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import deltatune.methods.fourierft
from deltatune import FourierFTConfig, PeftModel, get_peft_model
from deltatune.errors import ConfigError, MismatchError, PeftWarning

PLACES = [[509, 239, 538], [359, 147, 367]]  # the first that torch.randperm gives for 768 x 768 and seed 777


def adapted(layer: nn.Module, shake: bool = True, **options):
    torch.manual_seed(0)
    config = FourierFTConfig(target_modules=["layer"], **options)
    wrapper = get_peft_model(nn.ModuleDict({"layer": layer}).double(), config).get_base_model()["layer"]
    fourier = wrapper.adapters["default"]
    if shake:
        nn.init.normal_(fourier.fourierft_spectrum)
    return wrapper, fourier


def change(fourier, height: int, width: int, scaling: float) -> torch.Tensor:
    """The double sum of the paper, coefficient by coefficient."""
    found = torch.zeros(height, width, dtype=torch.float64)
    for c, j, k in zip(fourier.fourierft_spectrum.tolist(), *fourier.indices.tolist()):
        for p in range(height):
            for q in range(width):
                wave = cmath.exp(2j * math.pi * (p * j / height + q * k / width))
                found[p, q] += scaling * c * wave.real / (height * width)
    return found


@pytest.mark.parametrize("height,width", [(5, 8), (8, 5), (6, 6), (7, 3), (1, 4), (4, 1), (2, 2)])
@pytest.mark.parametrize("rows", [1, 60])  # few vectors are transformed, for many the matrix is
def test_the_summand_is_the_real_part_of_the_inverse_transform(height, width, rows):
    entries = height * width  # all coefficients, so that every place and its mirror image occur
    wrapper, fourier = adapted(nn.Linear(width, height), n_frequency=entries, scaling=7.0)
    expected = wrapper.base_layer.weight + change(fourier, height, width, 7.0)
    assert_close(wrapper.stored_weight(["default"]), expected)
    x = torch.randn(rows, width, dtype=torch.float64)
    assert_close(wrapper(x), x @ expected.T + wrapper.base_layer.bias)


def test_few_vectors_build_no_matrix_and_many_do(monkeypatch):
    wrapper, fourier = adapted(nn.Linear(16, 10), n_frequency=8)
    built, inside = [], type(fourier).delta
    monkeypatch.setattr(type(fourier), "delta", lambda self, c: built.append(1) or inside(self, c))
    wrapper(torch.randn(2, 10, 16, dtype=torch.float64)).sum().backward()
    assert built == []
    out = wrapper(torch.randn(21, 16, dtype=torch.float64))
    assert built == [1]
    out.sum().backward()
    assert built == [1, 1], "built again for the gradient, and kept by nobody"


def test_conv1d_of_gpt2_is_seen_as_out_by_in():
    wrapper, fourier = adapted(Conv1D(4, 6), n_frequency=5)
    x = torch.randn(2, 6, dtype=torch.float64)
    weight = wrapper.base_layer.weight + change(fourier, 4, 6, 150.0).T
    assert_close(wrapper(x), x @ weight + wrapper.base_layer.bias)


@pytest.mark.parametrize("ids", [(3,), (40,)])
def test_an_embedding_reads_columns(ids):
    wrapper, fourier = adapted(nn.Embedding(9, 6), n_frequency=10)
    x = torch.randint(9, ids)
    assert_close(wrapper(x), (wrapper.base_layer.weight + change(fourier, 6, 9, 150.0).T)[x])


def test_the_places_are_those_of_files():
    """Files hold the seed alone, so the stream of random numbers is a part of their format."""
    _, fourier = adapted(nn.Linear(768, 768), n_frequency=3)
    drawn = torch.randperm(768 * 768, generator=torch.Generator().manual_seed(777))[:3]
    assert torch.equal(fourier.indices, torch.stack([drawn // 768, drawn % 768]))
    assert fourier.indices.tolist() == PLACES, "torch draws other permutations than when this was written"
    _, other = adapted(nn.Linear(768, 768), n_frequency=3, random_loc_seed=778)
    assert not torch.equal(other.indices, fourier.indices)


def test_what_trains_and_what_is_saved():
    _, fourier = adapted(Conv1D(2304, 768))
    assert sum(p.numel() for p in fourier.parameters()) == 1000
    assert set(fourier.file_tensors()) == {"fourierft_spectrum"}
    assert fourier.indices.shape == (2, 1000) and len({tuple(place) for place in fourier.indices.T.tolist()}) == 1000


def test_starts():
    wrapper, fourier = adapted(nn.Linear(40, 40), shake=False, n_frequency=1000)
    assert fourier.fourierft_spectrum.std().item() == pytest.approx(1, abs=0.1)
    wrapper, _ = adapted(nn.Linear(8, 5), shake=False, n_frequency=4, init_weights=True)
    assert torch.equal(wrapper.stored_weight(["default"]), wrapper.base_layer.weight)


def test_half_precision_is_transformed_in_single():
    wrapper, _ = adapted(nn.Linear(8, 5), n_frequency=9)
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = wrapper(x)
    out = wrapper.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16 and (out - expected).norm() < 0.02 * expected.norm()


def test_more_coefficients_than_entries_are_refused():
    with pytest.raises(ConfigError, match=r"n_frequency=1000 .*at most 40, the entries of layer"):
        adapted(nn.Linear(8, 5))


def test_a_number_of_its_own_for_some_layers():
    def counts(pattern):
        net = nn.ModuleDict({"query": nn.Linear(8, 8), "value": nn.Linear(8, 8)})
        config = FourierFTConfig(n_frequency=4, target_modules=["query", "value"], n_frequency_pattern=pattern)
        model = get_peft_model(net, config).get_base_model()
        return [len(layer.adapters["default"].fourierft_spectrum) for layer in model.values()]

    assert counts({"value": 2}) == [4, 2] and counts({"q.*": 8}) == [8, 4]
    with pytest.warns(PeftWarning, match=r"n_frequency_pattern.*'other'"):
        counts({"other": 2})


@pytest.mark.parametrize(
    "options",
    [{"n_frequency": 0}, {"scaling": 0.0}, {"random_loc_seed": 2**64}, {"random_loc_seed": None}, {"bias": "some"}],
    ids=str,
)
def test_refused_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        FourierFTConfig(**options)


def test_places_that_come_out_otherwise_are_noticed_on_loading(tmp_path, monkeypatch):
    """Files hold a checksum of what the seed has drawn."""
    net = nn.Sequential(nn.Linear(8, 5))
    get_peft_model(net, FourierFTConfig(n_frequency=4, target_modules=["0"])).save_pretrained(tmp_path)
    fresh = nn.Sequential(nn.Linear(8, 5))
    fresh.load_state_dict({"0.weight": net[0].base_layer.weight, "0.bias": net[0].base_layer.bias})
    inside = deltatune.methods.fourierft.drawn_positions
    monkeypatch.setattr(deltatune.methods.fourierft, "drawn_positions", lambda *a: (inside(*a) + 1) % 5)
    with pytest.raises(MismatchError, match="fourierft_indices"):
        PeftModel.from_pretrained(fresh, tmp_path)
