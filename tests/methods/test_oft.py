"""OFT against arXiv 2306.07280 (Cayley, section 3.2) and 2506.19847 (the series): W' = W R^T, R block-diagonal."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from deltatune import OFTConfig, PeftModel, get_peft_model
from deltatune.errors import ConfigError, MismatchError
from deltatune.factors import cayley_neumann


def adapted(layer: nn.Module, scale: float = 0.3, **options):
    torch.manual_seed(0)
    model = get_peft_model(nn.ModuleDict({"layer": layer}).double(), OFTConfig(target_modules=["layer"], **options))
    wrapper = model.get_base_model()["layer"]
    oft = wrapper.adapters["default"]
    nn.init.normal_(oft.entries, std=scale)
    return wrapper, oft


def skew(entries: Tensor, size: int) -> Tensor:
    Q = torch.zeros(size, size, dtype=entries.dtype)
    k = 0
    for i in range(size):
        for j in range(i + 1, size):
            Q[i, j], Q[j, i] = entries[k], -entries[k]
            k += 1
    return Q


def test_the_cayley_rotation_turns_every_block_of_the_input():
    wrapper, oft = adapted(nn.Linear(12, 5), oft_block_size=4, use_cayley_neumann=False)
    blocks = []
    for entries in oft.oft_R.weight:
        Q, eye = skew(entries, 4), torch.eye(4, dtype=torch.float64)
        blocks.append((eye - Q) @ torch.linalg.inv(eye + Q))
    R = torch.block_diag(*blocks)
    x = torch.randn(7, 12, dtype=torch.float64)
    assert_close(wrapper(x), (x @ R) @ wrapper.base_layer.weight.T + wrapper.base_layer.bias)
    assert_close(wrapper.stored_weight(["default"]), wrapper.base_layer.weight @ R.T)
    assert_close(R @ R.T, torch.eye(12, dtype=torch.float64))
    assert torch.linalg.det(R).item() == pytest.approx(1)


@pytest.mark.parametrize("leading", [(7,), (2, 3), ()])
def test_in_half_precision_the_rotation_is_single_and_nothing_wider_than_the_input_is_kept(leading):
    torch.manual_seed(0)
    config = OFTConfig(target_modules=["layer"], oft_block_size=4)
    model = get_peft_model(nn.ModuleDict({"layer": nn.Linear(12, 5).bfloat16()}), config)
    oft = model.get_base_model()["layer"].adapters["default"]
    nn.init.normal_(oft.entries, std=0.3)
    x = torch.randn(*leading, 12).bfloat16().requires_grad_()
    R = torch.block_diag(*oft.R.detach()).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        turned = oft.rotate(x)
    assert not [t for t in kept if t.shape == x.shape and t.dtype != x.dtype]
    expected = x.float() @ R
    assert_close(turned.float(), expected, rtol=2**-8, atol=1e-6)
    pull = torch.randn(x.shape).bfloat16()
    of_x, of_entries = torch.autograd.grad(turned, (x, oft.entries), pull)
    assert_close(of_x.float(), pull.float() @ R.T, rtol=2**-8, atol=1e-6)
    (of_R,) = torch.autograd.grad(expected, R, pull.float())
    blocks = torch.stack([of_R[i : i + 4, i : i + 4] for i in range(0, 12, 4)])
    assert_close(of_entries, torch.autograd.grad(oft.R, oft.entries, blocks)[0])


def test_a_rotation_keeps_angles_and_lengths_of_the_rows():
    """The hyperspherical energy of section 3.1 depends on these alone."""
    wrapper, _ = adapted(nn.Linear(12, 5), oft_block_size=6, use_cayley_neumann=False)
    W, new = wrapper.base_layer.weight, wrapper.stored_weight(["default"])
    assert_close(new @ new.T, W @ W.T) and not torch.allclose(new, W)


@pytest.mark.parametrize("terms", [4, 5, 6, 8])
def test_the_series_approaches_the_rotation_to_its_order(terms):
    """(I + Q)(I - Q)^-1 = I + 2Q + 2Q^2 + ...; the last power has weight one, so the error is of its order."""
    errors = []
    for size in (0.1, 0.05):
        Q = skew(size * torch.linspace(0.5, 1.5, 6, dtype=torch.float64), 4)
        eye = torch.eye(4, dtype=torch.float64)
        errors.append((cayley_neumann(Q[None], terms)[0] - (eye + Q) @ torch.linalg.inv(eye - Q)).norm().item())
    assert errors[0] / errors[1] == pytest.approx(2 ** (terms - 1), rel=0.15)


def test_five_terms_written_out():
    _wrapper, oft = adapted(nn.Linear(8, 3), oft_block_size=4)
    blocks = []
    for entries in oft.oft_R.weight:
        Q = skew(entries, 4)
        blocks.append(torch.eye(4, dtype=torch.float64) + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q)
    assert_close(torch.block_diag(*oft.R), torch.block_diag(*blocks))


@pytest.mark.parametrize(
    "options,count",
    [
        ({"oft_block_size": 4}, 3 * 6),
        ({"r": 2, "oft_block_size": 0}, 2 * 15),
        ({"oft_block_size": 12}, 66),
        ({"oft_block_size": 4, "block_share": True}, 6),
    ],
)
def test_a_block_of_width_b_trains_b_times_b_minus_one_over_two(options, count):
    _, oft = adapted(nn.Linear(12, 5), **options)
    assert sum(p.numel() for p in oft.parameters()) == count


def test_a_shared_block_turns_every_part_alike():
    _, oft = adapted(nn.Linear(12, 5), oft_block_size=4, block_share=True)
    assert oft.R.shape == (3, 4, 4) and torch.equal(oft.R[0], oft.R[2])


def test_constrained_blocks_stay_within_eps_of_the_identity_and_still_train():
    """Section 3.3: a ball of radius eps around the identity, shared among the blocks."""
    wrapper, oft = adapted(nn.Linear(12, 5), oft_block_size=4, coft=True, eps=0.01, use_cayley_neumann=False)
    eye = torch.eye(4, dtype=torch.float64)
    distance = (oft.R - eye).norm(dim=(1, 2))
    assert (distance <= 2.1 * 0.01 / 3**0.5).all() and (distance > 0).all()
    wrapper(torch.randn(3, 12, dtype=torch.float64)).square().sum().backward()
    assert oft.oft_R.weight.grad.abs().min() > 0


def test_dropped_blocks_are_the_identity_in_training_only():
    _wrapper, oft = adapted(nn.Linear(64, 3), oft_block_size=4, module_dropout=0.5)
    eye = torch.eye(4, dtype=torch.float64)
    oft.train()
    dropped = sum(torch.equal(block, eye) for block in oft.R)
    assert 0 < dropped < 16
    oft.eval()
    assert not any(torch.equal(block, eye) for block in oft.R)


def test_a_width_that_does_not_divide_is_refused_with_the_nearest_that_does():
    with pytest.raises(ConfigError, match=r"oft_block_size=5 .*12 inputs.*is [46]"):
        adapted(nn.Linear(12, 5), oft_block_size=5)
    with pytest.raises(ConfigError, match=r"r=5 .*12 inputs.*is [46]"):
        adapted(nn.Linear(12, 5), r=5, oft_block_size=0)
    with pytest.raises(ConfigError, match="give one of them and 0"):
        OFTConfig(r=2, oft_block_size=4)
    with pytest.raises(ConfigError, match="2 or more"):
        OFTConfig(num_cayley_neumann_terms=1)


def test_an_embeddings_rows_are_turned_as_they_come_out():
    wrapper, oft = adapted(nn.Embedding(7, 12), oft_block_size=4, use_cayley_neumann=False)
    R = torch.block_diag(*oft.R)
    ids = torch.tensor([[0, 3], [6, 3]])
    assert_close(wrapper(ids), wrapper.base_layer(ids) @ R)
    assert_close(wrapper.stored_weight(["default"]), wrapper.base_layer.weight @ R)
    assert not torch.allclose(R, R.T) and oft.oft_R is None
    assert list(oft.file_tensors()) == ["oft_embedding_R.weight"]
    with pytest.raises(ConfigError, match=r"oft_block_size=5 .*12 columns"):
        adapted(nn.Embedding(7, 12), oft_block_size=5)


@pytest.mark.parametrize(
    "width,options,size",
    [
        (12, {"oft_block_size": 5}, 4),  # of 4 and 6 the smaller
        (22, {"oft_block_size": 9}, 11),
        (12, {"oft_block_size": 32}, 12),
        (7, {"oft_block_size": 2}, 1),
        (12, {"oft_block_size": 0, "r": 5}, 3),  # 4 blocks
        (12, {"oft_block_size": 0, "r": 11}, 1),
    ],
)
def test_a_size_is_adjusted_layer_by_layer_where_that_is_asked_for(width, options, size):
    wrapper, oft = adapted(nn.Linear(width, 5), adjust_size=True, **options)
    assert (oft.oft_block_size, oft.blocks) == (size, width // size)
    x = torch.randn(3, width, dtype=torch.float64)
    assert torch.equal(wrapper(x), wrapper.base_layer(x)) == (size == 1)
    with pytest.raises(ConfigError, match=r"adjust_size=True"):
        adapted(nn.Linear(width, 5), **options)


def test_files_do_not_name_the_adjusted_sizes_and_are_read_all_the_same(tmp_path):
    bare = lambda width=12: (torch.manual_seed(1), nn.Sequential(nn.Linear(width, 5)))[1]
    model = get_peft_model(bare(), OFTConfig(oft_block_size=5, target_modules=["0"], adjust_size=True))
    nn.init.normal_(model.get_base_model()[0].adapters["default"].entries)
    model.save_pretrained(tmp_path)
    assert "adjust_size" not in (tmp_path / "adapter_config.json").read_text()
    x = torch.randn(3, 12)
    assert torch.equal(PeftModel.from_pretrained(bare(), tmp_path)(x), model(x))
    with pytest.raises(MismatchError, match=r"oft_R.*\(3, 6\)"):
        PeftModel.from_pretrained(bare(20), tmp_path, allow_base_mismatch=True)


def test_the_shortest_series_is_one_plus_two_q():
    Q = skew(torch.randn(6, dtype=torch.float64), 4)[None]
    assert_close(cayley_neumann(Q, 2), torch.eye(4, dtype=torch.float64)[None] + 2 * Q)


def test_the_gradient_passes_the_constraint_as_if_it_were_not_there():
    """As the authors train: a block that has been drawn back gets the gradient of where it was drawn to, whole."""
    _, oft = adapted(nn.Linear(8, 5), oft_block_size=4, coft=True, eps=1e-3, use_cayley_neumann=False)
    direction = torch.randn_like(oft.R)
    (oft.R * direction).sum().backward()
    _, free = adapted(nn.Linear(8, 5), oft_block_size=4, use_cayley_neumann=False)
    with torch.no_grad():  # the same rotations, without a constraint
        norm = 2**0.5 * free.entries.norm(dim=1, keepdim=True)
        free.entries.mul_(1e-3 / 2**0.5 / norm)
    assert_close(free.R, oft.R, rtol=1e-6, atol=1e-9)
    (free.R * direction).sum().backward()
    assert_close(oft.entries.grad, free.entries.grad, rtol=1e-5, atol=1e-8)
