"""RoAd against arXiv 2409.00119: W' = R W, b' = R b, R in blocks [[a cos t, -a sin t], [a sin t, a cos t]]."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from deltatune import RoadConfig, get_peft_model
from deltatune.errors import ConfigError

COUNTS = {"road_1": 1, "road_2": 2, "road_4": 4}


def adapted(layer: nn.Module, scale: float = 0.5, **options):
    torch.manual_seed(0)
    model = get_peft_model(nn.ModuleDict({"layer": layer}).double(), RoadConfig(target_modules=["layer"], **options))
    wrapper = model.get_base_model()["layer"]
    road = wrapper.adapters["default"].double()
    with torch.no_grad():
        for parameter in road.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return wrapper, road


def matrix(road, out: int, size: int, variant: str) -> Tensor:
    """R entry by entry: output i of the first half of a group is turned with output i + size / 2."""
    R = torch.zeros(out, out, dtype=torch.float64)
    theta, alpha = road.road_theta.tolist(), road.road_alpha.tolist()
    half = size // 2
    for group in range(out // size):
        for k in range(half):
            i, j = group * size + k, group * size + k + half
            if variant == "road_1":  # one for the pair
                p = group * half + k
                places = (p, p, p, p)
            elif variant == "road_2":  # one for a row
                places = (i, i, j, j)
            else:  # one for an entry; a group's diagonal ones come before those beside it
                places = (i + group * size, i + (group + 1) * size, j + (group + 1) * size, j + group * size)
            entry = [(alpha[p] * math.cos(theta[p]), alpha[p] * math.sin(theta[p])) for p in places]
            R[i, i], R[i, j], R[j, i], R[j, j] = entry[0][0], -entry[1][1], entry[2][1], entry[3][0]
    return R


@pytest.mark.parametrize("variant", COUNTS)
def test_pairs_of_outputs_are_turned_and_scaled_with_their_bias(variant):
    wrapper, road = adapted(nn.Linear(5, 12), variant=variant, group_size=4)
    base, R = wrapper.base_layer, matrix(road, 12, 4, variant)
    assert_close(wrapper.stored_weight(["default"]), R @ base.weight)
    assert_close(wrapper.bias, R @ base.bias)
    x = torch.randn(7, 5, dtype=torch.float64)
    assert_close(wrapper(x), (x @ base.weight.T + base.bias) @ R.T)
    assert not torch.allclose(R, R.T) and not torch.allclose(R.diagonal(), torch.ones(12, dtype=torch.float64))


def test_the_first_variant_is_a_rotation_times_a_scale():
    _, road = adapted(nn.Linear(5, 6), group_size=6)
    R = road.adapt(torch.eye(6, dtype=torch.float64))
    assert_close(R @ R.T, torch.diag(road.road_alpha.repeat(2).square()))


def test_channels_of_a_convolution_and_rows_of_an_embedding_are_outputs():
    wrapper, road = adapted(nn.Conv2d(3, 8, 2), variant="road_4", group_size=4)
    base, R = wrapper.base_layer, matrix(road, 8, 4, "road_4")
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    assert_close(wrapper(x), torch.einsum("oc,bchw->bohw", R, base(x)))
    assert_close(wrapper(x[0]), wrapper(x)[0])
    wrapper, road = adapted(nn.Embedding(9, 8), variant="road_2", group_size=8)
    assert_close(wrapper.stored_weight(["default"]), wrapper.base_layer.weight @ matrix(road, 8, 8, "road_2").T)


@pytest.mark.parametrize("variant", COUNTS)
def test_a_pair_trains_one_two_or_four_angles_and_scales(variant):
    for layer, out in ((nn.Linear(5, 12), 12), (nn.Conv2d(3, 8, 2), 8), (nn.Embedding(9, 4), 4)):
        _, road = adapted(layer, variant=variant, group_size=4)
        assert sum(p.numel() for p in road.parameters()) == 2 * COUNTS[variant] * out // 2


def test_it_starts_as_the_identity_bit_for_bit():
    wrapper, _ = adapted(nn.Linear(5, 12), scale=0, group_size=4)
    x = torch.randn(7, 5, dtype=torch.float64)
    assert torch.equal(wrapper(x), wrapper.base_layer(x))


def test_half_precision_keeps_a_scale_that_it_cannot_hold():
    """1.001 is 1 in bfloat16, but 1000 times 0.001 is not nothing."""
    wrapper, road = adapted(nn.Linear(1, 2), scale=0, group_size=2)
    wrapper.base_layer.to(torch.bfloat16).weight.data.fill_(1)
    wrapper.base_layer.bias.data.zero_()
    road.float().road_alpha.data.fill_(1.01)
    assert wrapper(torch.tensor([[100.0]], dtype=torch.bfloat16)).tolist() == [[101.0, 101.0]]


def test_outputs_that_do_not_divide_are_refused_with_the_nearest_that_do():
    with pytest.raises(ConfigError, match=r"group_size=8 .*12 outputs.*is 6"):
        adapted(nn.Linear(5, 12), group_size=8)
    with pytest.raises(ConfigError, match="7 outputs of layer; an odd number"):
        adapted(nn.Linear(5, 7), group_size=2)
    with pytest.raises(ConfigError, match=r"group_size=3.*even"):
        RoadConfig(group_size=3)
    with pytest.raises(ConfigError, match=r"variant='road_3'.*'road_4'"):
        RoadConfig(variant="road_3")
