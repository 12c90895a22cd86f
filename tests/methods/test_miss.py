"""MiSS against arXiv 2409.15371 (first called Bone): one small D for every block of inputs; "bat" mixes W with it."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import MissConfig, get_peft_model
from deltatune.errors import ConfigError


def adapted(layer: nn.Module, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = get_peft_model(nn.ModuleDict({"layer": layer}).to(dtype), MissConfig(target_modules=["layer"], **options))
    wrapper = model.get_base_model()["layer"]
    return wrapper, wrapper.adapters["default"]


def shake(adapter: nn.Module, std: float = 0.5) -> None:
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=std)


@pytest.mark.parametrize("r", [1, 4, 5, 12])  # 5 leaves a rest of 2 inputs
def test_inputs_r_apart_share_their_change(r):
    wrapper, miss = adapted(nn.Linear(12, 8), r=r)
    assert miss.miss_block.shape == (r, 8)
    shake(miss)
    W = wrapper.base_layer.weight.detach().clone()
    for out in range(8):
        for i in range(12):
            W[out, i] += miss.miss_block[i % r, out].detach()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    assert_close(wrapper(x), x @ W.T + wrapper.base_layer.bias)
    assert_close(wrapper.stored_weight(["default"]), W)


@pytest.mark.parametrize("mini_r", [1, 2, 8])
def test_mini_shares_the_change_of_outputs_too(mini_r):
    wrapper, miss = adapted(nn.Linear(12, 8), r=5, init_weights="mini", mini_r=mini_r)
    assert miss.miss_block.shape == (5, mini_r)
    shake(miss)
    W = wrapper.base_layer.weight.detach().clone()
    for out in range(8):
        for i in range(12):
            W[out, i] += miss.miss_block[i % 5, out % mini_r].detach()
    x = torch.randn(5, 12, dtype=torch.float64)
    assert_close(wrapper(x), x @ W.T + wrapper.base_layer.bias)
    assert_close(wrapper.stored_weight(["default"]), W)


@pytest.mark.parametrize("r", [2, 4])
def test_bat_mixes_the_columns_of_every_block(r):
    wrapper, miss = adapted(nn.Linear(12, 8), r=r, init_weights="bat")
    assert miss.miss_block.shape == (8 // r, r, r)
    shake(miss)
    old = wrapper.base_layer.weight.detach()
    W = torch.empty_like(old)
    for j in range(8 // r):
        for i in range(12 // r):
            rows, columns = slice(j * r, j * r + r), slice(i * r, i * r + r)
            D, block = miss.miss_block[j].detach(), old[rows, columns]
            W[rows, columns] = block + block @ D + D
    x = torch.randn(5, 12, dtype=torch.float64)
    assert_close(wrapper(x), x @ W.T + wrapper.base_layer.bias)
    assert_close(wrapper.stored_weight(["default"]), W)


@pytest.mark.parametrize("options", [{}, {"init_weights": "mini", "mini_r": 2}, {"init_weights": "bat"}], ids=str)
def test_on_an_embedding_and_on_a_convolution(options):
    for layer, width in ((nn.Embedding(12, 8), 12), (nn.Conv1d(4, 8, 3), 12)):
        wrapper, miss = adapted(layer, r=4, miss_dropout=0.5, **options)
        wrapper.eval()
        shake(miss)
        update = miss.update(wrapper.as_map().weight)
        assert update.shape == (8, width)
        if not miss.bat:
            assert_close(update[:, 5], miss.miss_block[1].repeat(8 // miss.miss_block.shape[1]))
        if isinstance(layer, nn.Embedding):
            ids = torch.arange(12)
            assert_close(wrapper.train()(ids), layer.weight + update.T)  # no dropout of indices
        else:
            x = torch.randn(2, 4, 9, dtype=torch.float64)
            assert_close(wrapper(x), nn.functional.conv1d(x, layer.weight + update.reshape(8, 4, 3), layer.bias))


@pytest.mark.parametrize(
    "options,count",
    [({"r": 64}, 64 * 2304), ({"r": 64, "init_weights": "mini", "mini_r": 36}, 64 * 36),
     ({"r": 64, "init_weights": "bat"}, 64 * 2304)],
)  # fmt: skip
def test_counts_on_gpt2s_joint_projection(options, count):
    _, miss = adapted(nn.Linear(768, 2304), **options)
    assert sum(p.numel() for p in miss.parameters()) == count and not miss.miss_block.any()


def test_a_random_start_is_as_deep_as_pefts():
    _, miss = adapted(nn.Linear(768, 400), r=64, init_weights=False)
    assert 0.049 < miss.miss_block.abs().max() <= 0.05 and miss.identity_at_birth is not True  # +- 1 / sqrt(outputs)


def test_dropout_acts_on_the_input_of_the_change_in_training_only():
    wrapper, miss = adapted(nn.Linear(12, 8), r=4, miss_dropout=0.5)
    shake(miss)
    x = torch.randn(64, 12, dtype=torch.float64)
    quiet = wrapper.eval()(x)
    assert torch.equal(wrapper(x), quiet)
    torch.manual_seed(3)
    noisy = wrapper.train()(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    assert_close(noisy, wrapper.base_layer(x) + dropped.reshape(64, 3, 4).sum(1) @ miss.miss_block)


def test_a_change_below_the_rounding_of_the_weight_is_not_lost_in_half_precision():
    wrapper, miss = adapted(nn.Linear(64, 32, bias=False), torch.bfloat16, r=4, init_weights="bat")
    nn.init.ones_(wrapper.base_layer.weight)
    shake(miss, 1e-5)
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    x[0, 5] = 1.0
    change = miss.update(wrapper.base_layer.weight)[:, 5]
    wrapper.base_layer.register_forward_hook(lambda module, args, out: torch.zeros_like(out))  # the change alone
    assert (wrapper(x)[0].float() - change).norm() < 0.01 * change.norm()


def test_refusals_name_the_nearest_value():
    with pytest.raises(ConfigError, match=r"r=13 is more than the 12 inputs of layer; use at most 12"):
        adapted(nn.Linear(12, 20), r=13)
    with pytest.raises(ConfigError, match=r"r=5 does not divide both sides of layer, \(8, 12\), .*does is 4") as caught:
        adapted(nn.Linear(12, 8), r=5, init_weights="bat")
    assert caught.value.field == "r" and caught.value.expected == 4
    with pytest.raises(ConfigError, match=r"mini_r=3 does not divide the 8 outputs of layer; .* is 2"):
        adapted(nn.Linear(12, 8), r=4, init_weights="mini", mini_r=3)
    adapted(nn.Linear(12, 8), r=4, mini_r=3)  # not used
    for wrong in ({"r": 0}, {"mini_r": 0}, {"init_weights": "gaussian"}, {"bias": "some"}, {"miss_dropout": 2.0}):
        with pytest.raises(ConfigError, match=f"MissConfig: {next(iter(wrong))}"):
            MissConfig(**wrong)
