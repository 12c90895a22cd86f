"""BOFT against arXiv 2311.06243, section 4: W' = diag(s) W R^T, R = B_m ... B_1, B_i = P_i diag(blocks) P_i^T."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from deltatune import BOFTConfig, PeftModel, get_peft_model
from deltatune.errors import ConfigError, MismatchError


def adapted(layer: nn.Module, scale: float = 0.5, **options):
    torch.manual_seed(0)
    model = get_peft_model(nn.ModuleDict({"layer": layer}).double(), BOFTConfig(target_modules=["layer"], **options))
    wrapper = model.get_base_model()["layer"]
    boft = wrapper.adapters["default"].double()
    with torch.no_grad():
        for parameter in boft.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return wrapper, boft


def factor(blocks: Tensor, order: int) -> Tensor:
    """B of one factor: among the half blocks of 2^order blocks, a is turned together with a + 2^order."""
    count, size, _ = blocks.shape
    half, width, distance = size // 2, count * size, 2**order
    B = torch.zeros(width, width, dtype=blocks.dtype)
    for block in range(count):
        group, within = divmod(block, distance)
        first = group * 2 * distance + within  # in half blocks
        halves = (first, first + distance) if order else (2 * block, 2 * block + 1)
        places = [h * half + k for h in halves for k in range(half)] if size % 2 == 0 else []
        places = places or [block * size + k for k in range(size)]
        skew = (blocks[block] - blocks[block].T) / 2
        eye = torch.eye(size, dtype=blocks.dtype)
        turn = (eye - skew) @ torch.linalg.inv(eye + skew)
        for i, row in enumerate(places):
            for j, column in enumerate(places):
                B[row, column] = turn[i, j]
    return B


def rotation(boft) -> Tensor:
    R = torch.eye(boft.boft_block_num * boft.boft_block_size, dtype=torch.float64)
    for order, blocks in enumerate(boft.boft_R):
        R = factor(blocks, order) @ R
    return R


@pytest.mark.parametrize("factors,size", [(1, 3), (1, 4), (2, 4), (3, 2), (4, 2)])
def test_the_factors_turn_the_inputs_in_order_and_the_scales_the_outputs(factors, size):
    width = 24 if size == 3 else 16
    wrapper, boft = adapted(nn.Linear(width, 5), boft_block_size=size, boft_n_butterfly_factor=factors)
    base, R = wrapper.base_layer, rotation(boft)
    assert_close(R @ R.T, torch.eye(width, dtype=torch.float64))
    expected = torch.diag(boft.boft_s.flatten()) @ base.weight @ R.T
    assert_close(wrapper.stored_weight(["default"]), expected)
    x = torch.randn(7, width, dtype=torch.float64)
    assert_close(wrapper(x), x @ expected.T + base.bias)
    assert torch.equal(wrapper.bias, base.bias), "the scale spares the bias"


def test_each_factor_doubles_the_inputs_that_reach_one_another():
    for factors, reach in ((1, 2), (2, 4), (3, 8), (4, 16)):
        _, boft = adapted(nn.Linear(16, 5), boft_block_size=2, boft_n_butterfly_factor=factors)
        R = boft.rotate(torch.eye(16, dtype=torch.float64))
        assert ((R.abs() > 1e-12).sum(dim=1) == reach).all()


def test_a_convolutions_patches_are_the_inputs():
    wrapper, boft = adapted(nn.Conv2d(4, 6, (3, 2)), boft_block_num=6, boft_block_size=0, boft_n_butterfly_factor=2)
    weight = wrapper.base_layer.weight.flatten(1)
    expected = torch.diag(boft.boft_s[0]) @ weight @ rotation(boft).T
    assert_close(wrapper.stored_weight(["default"]).flatten(1), expected)


@pytest.mark.parametrize("options,count", [({}, 3 * 16), ({"boft_block_size": 2, "boft_n_butterfly_factor": 2}, 48)])
def test_a_factor_trains_in_times_b_and_the_scale_the_outputs(options, count):
    _, boft = adapted(nn.Linear(12, 5), **options)
    assert sum(p.numel() for p in boft.parameters()) == count + 5


def test_it_starts_as_the_identity():
    wrapper, boft = adapted(nn.Linear(16, 5), scale=0, boft_n_butterfly_factor=3)
    assert torch.equal(boft.boft_R, torch.zeros_like(boft.boft_R)) and torch.equal(boft.s, torch.ones_like(boft.s))
    x = torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(wrapper(x), wrapper.base_layer(x))


def test_dropout_makes_some_blocks_of_one_factor_the_identity_in_training_only():
    _, boft = adapted(nn.Linear(32, 3), boft_n_butterfly_factor=3, boft_dropout=0.4)
    eye = torch.eye(4, dtype=torch.float64)
    same = lambda: (boft.rotations == eye).all(dim=(-1, -2)).sum(dim=1).tolist()
    boft.train()
    seen = [tuple(same()) for _ in range(20)]
    assert all(sorted(counts) == [0, 0, 3] for counts in seen), "40 % of 8 blocks, rounded down"
    assert len(set(seen)) == 3
    boft.eval()
    assert same() == [0, 0, 0]


def test_sizes_that_do_not_fit_are_refused_with_the_nearest_that_do():
    with pytest.raises(ConfigError, match=r"boft_block_size=5 with boft_n_butterfly_factor=1 .*12 inputs.*is [46]"):
        adapted(nn.Linear(12, 5), boft_block_size=5)
    with pytest.raises(ConfigError, match=r"boft_block_size=4 with boft_n_butterfly_factor=2 .*12 inputs.*is [26]"):
        adapted(nn.Linear(12, 5), boft_n_butterfly_factor=2)
    with pytest.raises(ConfigError, match=r"boft_block_num=5 .*12 inputs.*is 6"):
        adapted(nn.Linear(12, 5), boft_block_size=0, boft_block_num=5)
    with pytest.raises(ConfigError, match=r"factor=3 .*6 inputs.*fewer factors"):
        adapted(nn.Linear(6, 5), boft_n_butterfly_factor=3)
    with pytest.raises(ConfigError, match="give one of them and 0"):
        BOFTConfig(boft_block_num=4)
    with pytest.raises(ConfigError, match=r"boft_n_butterfly_factor=0"):
        BOFTConfig(boft_n_butterfly_factor=0)


def test_factors_that_a_file_lacks_are_the_identity(tmp_path):
    """As PEFT writes where it has no CUDA extension, under a config that asks for more."""
    bare = lambda: (torch.manual_seed(1), nn.Sequential(nn.Linear(16, 5)))[1]
    options = {"target_modules": ["0"], "boft_block_size": 4}
    one = get_peft_model(bare(), BOFTConfig(**options))
    nn.init.normal_(one.get_base_model()[0].adapters["default"].boft_R)
    one.save_pretrained(tmp_path)
    x = torch.randn(3, 16)
    asked = BOFTConfig(**options, boft_n_butterfly_factor=3)
    three = PeftModel.from_pretrained(bare(), tmp_path, config=asked)
    assert three.get_base_model()[0].adapters["default"].boft_R.shape == (3, 4, 4, 4)
    assert_close(three(x), one(x))
    three.save_pretrained(tmp_path / "three")
    with pytest.raises(MismatchError, match="boft_R"):
        PeftModel.from_pretrained(bare(), tmp_path / "three", config=BOFTConfig(**options))
