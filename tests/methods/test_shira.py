"""SHiRA against arXiv 2406.13175, section 3: W' = W + S, S zero outside of a fixed sparse mask."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from deltatune import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from deltatune.errors import ConfigError, MismatchError, StateError
from deltatune.factors import dense_enough, sparse_linear
from deltatune.methods.shira import UNSEEDED


def adapted(layer: nn.Module, shake: bool = True, mask_fn=None, **options):
    torch.manual_seed(0)
    config = ShiraConfig(target_modules=["layer"], **{"r": 2, **options})
    config.mask_fn = mask_fn
    wrapper = get_peft_model(nn.ModuleDict({"layer": layer}).double(), config).get_base_model()["layer"]
    shira = wrapper.adapters["default"]
    if shake:
        nn.init.normal_(shira.shira_weight)
    return wrapper, shira


def sparse(shira, height: int, width: int) -> torch.Tensor:
    S = torch.zeros(height, width, dtype=torch.float64)
    for value, row, column in zip(shira.shira_weight.tolist(), *shira.shira_indices.tolist()):
        S[row, column] += value
    return S


def checkered(base_layer, r):
    """The first r (in + out) of every second entry."""
    mask = torch.zeros(base_layer.weight.numel())
    mask[::2][: r * sum(base_layer.weight.shape)] = 1
    return mask.view(base_layer.weight.shape)


def test_the_summand_is_sparse():
    wrapper, shira = adapted(nn.Linear(12, 7))
    S = sparse(shira, 7, 12)
    assert int((S != 0).sum()) == shira.shira_weight.numel() == 2 * (12 + 7)
    expected = wrapper.base_layer.weight + S
    assert_close(wrapper.stored_weight(["default"]), expected)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    assert_close(wrapper(x), x @ expected.T + wrapper.base_layer.bias)


@pytest.mark.parametrize("seed,used", [(5, 5), (None, UNSEEDED)])
def test_places_are_drawn_as_files_expect_and_stand_row_by_row(seed, used):
    """Files hold the seed alone; the k-th number belongs to the k-th one of the mask."""
    _, shira = adapted(nn.Linear(12, 7), random_seed=seed)
    drawn = torch.randperm(7 * 12, generator=torch.Generator().manual_seed(used))[: 2 * 19].sort().values
    assert torch.equal(shira.shira_indices, torch.stack([drawn // 12, drawn % 12]).int())
    assert torch.Generator().initial_seed() == UNSEEDED
    assert set(shira.file_tensors()) == {"shira_weight"}


def test_conv1d_of_gpt2_is_seen_as_out_by_in():
    wrapper, shira = adapted(Conv1D(7, 12), r=1)
    x = torch.randn(3, 12, dtype=torch.float64)
    assert_close(wrapper(x), x @ (wrapper.base_layer.weight + sparse(shira, 7, 12).T) + wrapper.base_layer.bias)
    _, shira = adapted(Conv1D(2304, 768), r=32)
    assert sum(p.numel() for p in shira.parameters()) == 32 * (768 + 2304)


def test_an_embedding_reads_columns():
    wrapper, shira = adapted(nn.Embedding(9, 6), r=1)
    ids = torch.randint(9, (2, 3))
    assert_close(wrapper(ids), (wrapper.base_layer.weight + sparse(shira, 6, 9).T)[ids])


@pytest.mark.parametrize("count", [3, 60])  # few values, and many for the size of the matrix
@pytest.mark.parametrize("in_order", [False, True])
def test_a_sparse_product_and_its_gradients_are_those_of_the_matrix(count, in_order):
    torch.manual_seed(1)
    at = torch.randperm(20 * 30)[:count]
    at = at.sort().values if in_order else at
    rows, columns = at // 30, at % 30
    values = torch.randn(count, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 5, 30, dtype=torch.float64, requires_grad=True)
    S = values.new_zeros(20, 30).index_put((rows, columns), values)
    given, expected = sparse_linear(x, values, rows, columns, 20, in_order), x @ S.T
    assert_close(given, expected)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), (x, values)) for y in (given, expected))):
        assert_close(one, other)


def test_a_forward_of_a_linear_layer_builds_no_matrix_of_few_entries(monkeypatch):
    wrapper, shira = adapted(nn.Linear(160, 140), r=1)
    monkeypatch.setattr(type(shira), "matrix", lambda self, v: pytest.fail("dense"))
    wrapper(torch.randn(3, 160, dtype=torch.float64)).sum().backward()


def test_a_mask_of_the_users_own_goes_into_the_file(tmp_path):
    wrapper, shira = adapted(nn.Linear(12, 7), mask_fn=checkered, mask_type="checkered")
    assert torch.equal(sparse(shira, 7, 12) != 0, checkered(wrapper.base_layer, 2) != 0)
    model = get_peft_model(nn.Sequential(nn.Linear(12, 7)), _checkered_config())
    base = model.get_base_model()[0].base_layer
    nn.init.normal_(model.get_base_model()[0].adapters["default"].shira_weight)
    x = torch.randn(3, 12)
    expected = model(x)
    model.save_pretrained(tmp_path)
    fresh = nn.Sequential(nn.Linear(12, 7))
    fresh[0].load_state_dict(base.state_dict())
    loaded = PeftModel.from_pretrained(fresh, tmp_path)  # without the function
    assert torch.equal(loaded(x), expected)


def _checkered_config():
    config = ShiraConfig(r=2, target_modules=["0"], mask_type="checkered")
    config.mask_fn = checkered
    return config


def test_a_mask_is_of_the_layout_of_the_layers_weight():
    wrapper, shira = adapted(Conv1D(7, 12), mask_fn=checkered, mask_type="checkered")
    assert torch.equal(sparse(shira, 7, 12).T != 0, checkered(wrapper.base_layer, 2) != 0)


def test_a_mask_function_beside_the_random_type_gets_the_seed():
    seen = []
    adapted(nn.Linear(12, 7), mask_fn=lambda layer, r, random_seed: seen.append(random_seed) or checkered(layer, r),
            random_seed=11)  # fmt: skip
    assert seen == [11]


def test_a_mask_function_sees_the_bare_layer_under_other_adapters():
    model = get_peft_model(nn.Sequential(nn.Linear(12, 7)), LoraConfig(r=2, target_modules=["0"]), "below")
    model.add_adapter("above", _checkered_config())
    assert model.get_base_model()[0].adapters["above"].shira_indices.shape == (2, 38)


def test_a_named_mask_without_function_or_file_is_said_when_it_is_used():
    wrapper, _ = adapted(nn.Linear(12, 7), mask_type="checkered")
    with pytest.raises(StateError, match="mask_fn"):
        wrapper(torch.randn(3, 12, dtype=torch.float64))


@pytest.mark.parametrize(
    "mask_fn",
    [
        lambda layer, r: torch.ones(7, 12),
        lambda layer, r: checkered(layer, 1),
        lambda layer, r: 2 * checkered(layer, r),
        lambda layer, r: checkered(layer, r).T,
    ],
)
def test_masks_of_another_shape_or_count_are_refused(mask_fn):
    with pytest.raises(ConfigError, match=r"mask_fn.*layer.*\(7, 12\) with 38"):
        adapted(nn.Linear(12, 7), mask_fn=mask_fn, mask_type="mine")


def test_places_outside_of_the_weight_are_refused():
    _, shira = adapted(nn.Linear(12, 7))
    indices = shira.shira_indices.clone()
    assert torch.equal(shira.from_file({"shira_indices": indices.float()})["shira_indices"], indices)
    indices[1, 3] = 12
    with pytest.raises(MismatchError, match="outside"):
        shira.from_file({"shira_indices": indices})


def test_more_entries_than_the_weight_has_are_refused():
    with pytest.raises(ConfigError, match=r"r=5 .*layer.*at most r=4"):
        adapted(nn.Linear(12, 7), r=5)
    with pytest.raises(ConfigError, match="do not target"):
        adapted(nn.Linear(12, 1), r=1)


def test_starts():
    wrapper, _ = adapted(nn.Linear(12, 7), shake=False)
    assert torch.equal(wrapper.stored_weight(["default"]), wrapper.base_layer.weight)
    _, shira = adapted(nn.Linear(60, 60), shake=False, r=20, init_weights=False)
    assert shira.shira_weight.std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("height", "width", "dense"), [(7, 12, True), (210, 200, False)])
def test_the_strength_can_be_changed_afterwards(height, width, dense):
    """Section 3.3: alpha scales S when the adapter is used; entries act by a dense product or one by one."""
    wrapper, shira = adapted(nn.Linear(width, height), r=1)
    shira.scaling = 0.5
    expected = wrapper.base_layer.weight + sparse(shira, height, width) / 2
    assert_close(wrapper.stored_weight(["default"]), expected)
    x = torch.randn(3, width, dtype=torch.float64)
    assert dense_enough(len(shira.shira_weight), x, wrapper.as_map()) is dense
    assert_close(wrapper(x), x @ expected.T + wrapper.base_layer.bias)


@pytest.mark.parametrize("options", [{"r": 0}, {"random_seed": 2**64}], ids=str)
def test_refused_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        ShiraConfig(**options)
