"""WaveFT against arXiv 2505.12532, section 3: W' = W + lambda IDWT(S), one level, bands as in PEFT."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from deltatune import WaveFTConfig, get_peft_model
from deltatune.errors import ConfigError
from deltatune.wavelets import NAMES, analyse, filters, high_pass, low_pass, synthesise


def adapted(layer: nn.Module, shake: bool = True, **options):
    torch.manual_seed(0)
    config = WaveFTConfig(target_modules=["layer"], **options)
    wrapper = get_peft_model(nn.ModuleDict({"layer": layer}).double(), config).get_base_model()["layer"]
    wave = wrapper.adapters["default"]
    if shake:
        nn.init.normal_(wave.waveft_spectrum)
    return wrapper, wave


def change(wave, height: int, width: int, scaling: float, family: str) -> torch.Tensor:
    """Wave by wave: coefficient (i, j) of a band is the outer product of two filters that start at 2i and 2j."""
    low = low_pass(family)
    pair, beyond = (low, high_pass(low)), len(low) - 2
    tall, wide = (height + beyond + 1) // 2, (width + beyond + 1) // 2  # of one band
    found = torch.zeros(height, width, dtype=torch.float64)
    for c, row, column in zip(wave.waveft_spectrum.tolist(), *wave.waveft_indices.tolist()):
        row, column = row + (2 * tall - height) // 2, column + (2 * wide - width) // 2
        # the bands: low low, beside it high (rows) low, below it low high, high high
        down, across = pair[column // wide], pair[row // tall]
        for i, of_row in enumerate(down):
            for j, of_column in enumerate(across):
                r, s = 2 * (row % tall) + i - beyond, 2 * (column % wide) + j - beyond
                if 0 <= r < height and 0 <= s < width:
                    found[r, s] += scaling * c * of_row * of_column
    return found


@pytest.mark.parametrize("height,width", [(6, 8), (5, 8), (7, 3), (1, 4)])
@pytest.mark.parametrize("family", ["db1", "db2", "sym4", "coif1"])
@pytest.mark.parametrize("rows", [1, 60])  # few vectors are transformed, for many the matrix is
def test_the_summand_is_the_inverse_transform(height, width, family, rows):
    options = {"n_frequency": height * width, "scaling": 7.0, "wavelet_family": family}
    wrapper, wave = adapted(nn.Linear(width, height), **options)
    expected = wrapper.base_layer.weight + change(wave, height, width, 7.0, family)
    assert_close(wrapper.stored_weight(["default"]), expected)
    x = torch.randn(rows, width, dtype=torch.float64)
    assert_close(wrapper(x), x @ expected.T + wrapper.base_layer.bias)


@pytest.mark.parametrize("rows", [1, 60])
def test_without_the_transform_coefficients_are_entries(rows):
    wrapper, wave = adapted(nn.Linear(8, 5), n_frequency=11, scaling=3.0, use_idwt=False)
    expected = wrapper.base_layer.weight.detach().clone()
    for c, row, column in zip(wave.waveft_spectrum.tolist(), *wave.waveft_indices.tolist()):
        expected[row, column] += 3 * c
    assert_close(wrapper.stored_weight(["default"]), expected)
    x = torch.randn(rows, 8, dtype=torch.float64)
    assert_close(wrapper(x), x @ expected.T + wrapper.base_layer.bias)


@pytest.mark.parametrize("name", NAMES)
def test_filters_are_what_defines_them(name):
    low, high = filters(name)
    order = int(name.lstrip("dbsymcoif"))
    assert len(low) == (6 if name.startswith("coif") else 2) * order
    for shift in range(0, len(low), 2):
        assert abs(low[shift:] @ low[: len(low) - shift] - float(shift == 0)) < 1e-10
        assert abs(high[shift:] @ low[: len(low) - shift]) < 1e-10
    assert low.sum().item() == pytest.approx(math.sqrt(2))
    place = torch.arange(len(low), dtype=torch.float64) / len(low)
    for moment in range(2 * order if name.startswith("coif") else order):
        assert abs((place**moment) @ high) < 1e-9, f"moment {moment} vanishes"
    if name.startswith("coif"):
        centred = place - 2 * order / len(low)
        assert all(abs((centred**moment) @ low) < 1e-9 for moment in range(1, 2 * order))


def test_filters_as_they_are_printed():
    """Daubechies, Ten Lectures on Wavelets, table 6.1 and section 8.2; times sqrt(2) where the book has sum 2."""
    root = math.sqrt(3)
    db2 = [(1 + root) / 4, (3 + root) / 4, (3 - root) / 4, (1 - root) / 4]
    assert_close(torch.tensor(low_pass("db2")), torch.tensor(db2) / math.sqrt(2))
    assert_close(torch.tensor(low_pass("db1")), torch.tensor([1.0, 1.0]) / math.sqrt(2))
    root = math.sqrt(7)
    coif1 = [1 - root, 5 + root, 14 + 2 * root, 14 - 2 * root, 1 - root, -3 + root]
    assert_close(torch.tensor(low_pass("coif1")), torch.tensor(coif1) / (16 * math.sqrt(2)))
    # least asymmetric: of N = 4, as Daubechies' table 6.3 and PyWavelets have it
    sym4 = [0.03222310, -0.01260397, -0.09921954, 0.29785780, 0.80373875, 0.49761867, -0.02963553, -0.07576571]
    assert_close(torch.tensor(low_pass("sym4")), torch.tensor(sym4), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["db1", "db3", "sym5", "coif2"])
def test_the_transforms_are_transposes_of_each_other(name):
    pair = filters(name)
    m = (9 + pair.shape[1] - 2 + 1) // 2
    S = synthesise(torch.eye(2 * m, dtype=torch.float64), pair, 9)  # row k is the wave of coefficient k
    assert_close(analyse(torch.eye(9, dtype=torch.float64), pair, m), S.T)
    assert_close(S.T @ S, torch.eye(9, dtype=torch.float64))  # nothing is lost over the edges


def test_conv1d_of_gpt2_is_seen_as_out_by_in():
    wrapper, wave = adapted(Conv1D(4, 6), n_frequency=5)
    x = torch.randn(2, 6, dtype=torch.float64)
    assert_close(
        wrapper(x), x @ (wrapper.base_layer.weight + change(wave, 4, 6, 25.0, "db1").T) + wrapper.base_layer.bias
    )


@pytest.mark.parametrize("ids", [(2,), (40,)])
@pytest.mark.parametrize("options", [{"wavelet_family": "db2"}, {"use_idwt": False}], ids=str)
def test_an_embedding_reads_columns(ids, options):
    wrapper, _ = adapted(nn.Embedding(9, 6), n_frequency=20, **options)
    x = torch.randint(9, ids)
    assert_close(wrapper(x), wrapper.stored_weight(["default"])[x])


def test_what_trains_and_what_is_saved():
    _, wave = adapted(Conv1D(2304, 768))
    assert sum(p.numel() for p in wave.parameters()) == 2592
    assert set(wave.file_tensors()) == {"waveft_spectrum"}
    drawn = torch.randperm(768 * 2304, generator=torch.Generator().manual_seed(777))[:2592]
    assert torch.equal(wave.waveft_indices, torch.stack([drawn // 768, drawn % 768]))


def test_starts():
    wrapper, wave = adapted(nn.Linear(8, 5), shake=False, n_frequency=4)
    assert torch.equal(wrapper.stored_weight(["default"]), wrapper.base_layer.weight)
    _, wave = adapted(nn.Linear(40, 40), shake=False, n_frequency=1000, init_weights=False)
    assert wave.waveft_spectrum.std().item() == pytest.approx(0.01, rel=0.1)


def test_coefficients_shared_out_by_size():
    """Layers of 64, 16 and 4 entries share 3 x 7 coefficients."""
    net = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 2)])
    config = WaveFTConfig(n_frequency=7, target_modules=["0", "1", "2"], proportional_parameters=True)
    model = get_peft_model(net, config)
    counts = [len(layer.adapters["default"].waveft_spectrum) for layer in model.get_base_model()]
    assert counts == [round(21 * 64 / 84), round(21 * 16 / 84), round(21 * 4 / 84)] == [16, 4, 1]
    assert model.peft_config["default"].n_frequency_pattern == {}, "the config says what the user said"


def test_more_coefficients_than_entries_are_refused():
    with pytest.raises(ConfigError, match=r"n_frequency=2592 .*at most 40, the entries of layer"):
        adapted(nn.Linear(8, 5))


@pytest.mark.parametrize("family", ["coif4", "db11", "haar", "bior1.3"])
def test_unknown_wavelets_are_refused_where_they_would_be_used(family):
    with pytest.raises(ConfigError, match="wavelet_family"):
        WaveFTConfig(wavelet_family=family)
    WaveFTConfig(wavelet_family=family, use_idwt=False)


@pytest.mark.parametrize(
    "options",
    [
        {"n_frequency": 0},
        {"scaling": 0.0},
        {"random_loc_seed": 2**64},
        {"bias": "some"},
        {"n_frequency_pattern": {"a": 0}},
    ],
    ids=str,
)
def test_refused_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        WaveFTConfig(**options)
