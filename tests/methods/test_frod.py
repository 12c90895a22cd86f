"""FRoD against AAAI 40(31) 39813: W_i = U_i diag(l_i) V^T with one V; W_i' = U_i (S_i + diag(l_i')) V^T, S_i sparse."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from deltatune import FrodConfig, PeftModel, get_peft_model
from deltatune.errors import ConfigError, MismatchError, TargetError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def stack(blocks=4):
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(blocks))).double()


def adapted(base=None, move=True, **options):
    options = {"sparse_rate": 0.2, "target_modules": ["up", "down"], **options}
    model = get_peft_model(base or stack(), FrodConfig(**options)).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters() if move else ():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


def shared(model):
    return model.get_base_model().shared_by_adapters["default"]


def inverted(weight, V):
    """U and l of a weight, by the inverse of V."""
    product = weight.detach() @ torch.linalg.inv(V).T
    return product / product.norm(dim=0), product.norm(dim=0)


@pytest.mark.parametrize("name", ["up", "down"])
def test_it_is_the_papers_equation(name):
    model = adapted()
    held = shared(model)
    V = held.bases[held.names.index(name)].V
    for block in model.get_base_model()[:4]:
        layer = getattr(block, name)
        frod, weight = layer.adapters["default"], layer.base_layer.weight
        U, start = inverted(weight, V)
        assert_close(U @ torch.diag(start) @ V.T, weight.detach(), rtol=1e-4, atol=1e-5)
        middle = torch.diag(frod.frod_lambda_l.detach())
        for value, (row, column) in zip(frod.frod_lambda_s_values.detach(), layer.frod_s_indices["default"].T):
            middle[row, column] += value
        expected = U @ middle @ V.T
        assert_close(layer.stored_weight(["default"]).detach(), expected, rtol=1e-4, atol=1e-5)
        x = torch.randn(5, weight.shape[1], dtype=torch.float64)
        bias = 0 if layer.base_layer.bias is None else layer.base_layer.bias
        assert_close(layer(x).detach(), (x @ expected.T + bias).detach(), rtol=1e-4, atol=1e-4)


def test_V_is_the_joint_decomposition():
    """W_i = Q_i R of their common QR; V = R^T E, E diagonal for the mean of (Q_i^T Q_i + alpha)^-1."""
    model, alpha = adapted(move=False, regularization_alpha=0.3), 0.3
    held = shared(model)
    V = held.bases[held.names.index("up")].V
    weights = [block.up.base_layer.weight.detach() for block in model.get_base_model()[:4]]
    R = torch.linalg.qr(torch.cat(weights))[1]
    E = torch.linalg.inv(R.T) @ V
    assert_close(E.T @ E, torch.eye(6, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    parts = [weight @ torch.linalg.inv(R) for weight in weights]
    mean = sum(torch.linalg.inv(Q.T @ Q + alpha * torch.eye(6, dtype=torch.float64)) for Q in parts) / 4
    turned = E.T @ mean @ E
    assert_close(turned, torch.diag(turned.diagonal()), rtol=1e-4, atol=1e-4)
    assert turned.diagonal().diff().min() > 0, "in the order of the eigenvalues"
    assert not torch.allclose(V, shared(adapted(move=False, regularization_alpha=5.0)).bases[1].V, rtol=1e-3)


def test_layers_of_few_rows_share_their_singular_vectors():
    model = adapted(nn.Sequential(nn.Linear(8, 3)).double(), target_modules=["0"])
    V, layer = shared(model).bases[0].V, model.get_base_model()[0]
    assert_close(V.T @ V, torch.eye(8, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    product = layer.base_layer.weight.detach() @ V
    assert product[:, 3:].norm() < 1e-5 * product.norm(), "the null space last"


def test_places_are_distinct_off_the_diagonal_and_from_the_seed():
    places = {key: shared(adapted(move=False, projection_prng_key=key)).bases[0].places for key in (0, 1)}
    assert places[0].shape == (2, int(0.2 * 81)) and places[0].unique(dim=1).shape == places[0].shape
    assert (places[0][0] != places[0][1]).all() and places[0].max() == 8
    assert not torch.equal(places[0], places[1])
    assert torch.equal(places[0], shared(adapted(move=False)).bases[0].places)
    everything = shared(adapted(move=False, sparse_rate=1.0)).bases[0].places
    assert everything.shape == (2, 72) and everything.unique(dim=1).shape == (2, 72)
    assert shared(adapted(move=False, sparse_rate=0.001)).bases[0].places.shape == (2, 1), "one at least"


def test_counts_and_starts():
    model = adapted(move=False)
    assert model.get_nb_trainable_parameters()[0] == 4 * ((6 + 7) + (9 + 16))
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(model(x), stack()(x)), "to the bit"
    assert adapted(move=False, sparse_rate=0.0).get_nb_trainable_parameters()[0] == 4 * (6 + 9)
    moved = adapted(move=False, init_weights=False, sparse_rate=1.0).get_base_model()[0].down.adapters["default"]
    assert 0.05 < moved.frod_lambda_s_values.std() < 0.2
    assert 0 < (moved.frod_lambda_l - moved.start).abs().max() < 0.6


def test_the_bases_are_frozen_and_held_once():
    model = adapted()
    held = shared(model)
    before = held.bases[0].V.clone()
    model(torch.randn(7, 6, dtype=torch.float64)).square().sum().backward()
    assert torch.equal(held.bases[0].V, before) and not any(p.requires_grad for p in held.parameters())
    assert [tuple(basis.V.shape) for basis in held.bases] == [(9, 9), (6, 6)] and held.names == ["down", "up"]


def test_dropout_is_on_the_input_of_the_change():
    model = adapted(nn.Sequential(nn.Linear(6, 9)).double(), target_modules=["0"], frod_dropout=0.5)
    layer, x = model.get_base_model()[0], torch.ones(20000, 6, dtype=torch.float64)
    dropped, whole = model.train()(x) - layer.base_layer(x), model.eval()(x)[:1] - layer.base_layer(x[:1])
    assert_close(dropped.mean(0), whole[0], atol=0.2, rtol=0.1)
    assert len(dropped[:500].mul(1e6).round().unique(dim=0)) <= 2**6, "one pattern per subset of the inputs"


def test_layers_of_one_role_and_several_widths_have_a_basis_for_each():
    first, second = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)), nn.Sequential(nn.Linear(4, 6))
    base = nn.ModuleDict({"a": nn.ModuleDict({"side": second}), "b": nn.ModuleDict({"side": first})})
    model = get_peft_model(base, FrodConfig(target_modules=["0", "2"]))
    assert shared(model).names == ["side_0_4", "side_0_6", "side_2"]


def test_a_turned_layer_and_a_convolution():
    torch.manual_seed(0)
    base = nn.Sequential(Conv1D(9, 6), nn.Unflatten(1, (3, 3)), nn.Conv1d(3, 4, 2)).double()
    model = adapted(base, target_modules=["0", "2"])
    layer, conv = model.get_base_model()[0], model.get_base_model()[2]
    assert layer.frod_lambda_l["default"].shape == (6,) and conv.frod_lambda_l["default"].shape == (6,)
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = model(x)
    assert not torch.allclose(expected, base[0].base_layer(x).new_zeros(1))
    assert_close(copy.deepcopy(model).merge_and_unload()(x), expected)
    with pytest.raises(TargetError, match="its maths allows conv, linear"):
        get_peft_model(nn.Sequential(nn.Embedding(9, 4)), FrodConfig(target_modules=["0"]))


def test_files_hold_the_basis_of_few_layers_alone(tmp_path):
    """With two layers of a role eigenvalues come in equal pairs, and rounding decides what V is."""
    for blocks, kept in ((4, set()), (2, {"base_model.frod_V.up", "base_model.frod_V.down"})):
        model, x = adapted(stack(blocks)), torch.randn(3, 6, dtype=torch.float64)
        model.save_pretrained(tmp_path / str(blocks))
        tensors = load_file(tmp_path / str(blocks) / "adapter_model.safetensors")
        assert {key for key in tensors if key.startswith("base_model.frod")} == kept
        assert_close(PeftModel.from_pretrained(stack(blocks), tmp_path / str(blocks)).double()(x), model(x))
    other = FrodConfig(target_modules=["up", "down"], sparse_rate=0.2, projection_prng_key=1)
    with pytest.raises(MismatchError, match=r"frod_s_indices.down, frod_s_indices.up, derived here from"):
        PeftModel.from_pretrained(stack(), tmp_path / "4", config=other)


def test_another_basis_in_a_file_means_the_same_change(tmp_path):
    """U follows the V that is read; also where no columns of W lie along some of V's."""
    for number, base in enumerate((nn.Linear(6, 9), nn.Linear(9, 6))):
        net = nn.Sequential(base).double()
        model = adapted(net, target_modules=["0"])
        x, layer = torch.randn(3, base.in_features, dtype=torch.float64), model.get_base_model()[0]
        expected = model(x)
        model.save_pretrained(folder := tmp_path / str(number))
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        signs = torch.tensor([1.0, -1.0, 1.0]).repeat(base.in_features // 3).double()
        rows, columns = layer.frod_s_indices["default"]
        assert "base_model.frod_V.0" in tensors
        tensors["base_model.frod_V.0"] *= signs.to(tensors["base_model.frod_V.0"].dtype)
        values = tensors["base_model.model.0.frod_lambda_s_values"]
        values *= (signs[rows] * signs[columns]).to(values.dtype)  # U S V^T with columns of U and V turned round
        save_file(tensors, file, metadata={"format": "pt"})
        fresh = nn.Sequential(copy.deepcopy(layer.base_layer))
        assert_close(PeftModel.from_pretrained(fresh, folder)(x), expected, rtol=1e-4, atol=1e-4)


def test_places_outside_of_the_matrix_are_refused(tmp_path):
    adapted(save_projection=True).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.frod_s_indices.up"][0, 0] = 6
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=r"reach from . to 6, the layers read 6 features"):
        PeftModel.from_pretrained(stack(), tmp_path)


def test_options_are_checked():
    wrong = {"sparse_rate": 1.5, "regularization_alpha": 0, "frod_dropout": 1.0, "bias": "some"}
    for field, value in wrong.items():
        with pytest.raises(ConfigError) as caught:
            FrodConfig(**{field: value})
        assert caught.value.field == field


def test_in_single_precision_the_product_with_w_is_left_out():
    """U diag(l0) V^T is W, so U (S + diag(l)) V^T x is all there is to compute."""
    exact = adapted()
    model = copy.deepcopy(exact).float()
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    single = adapted(stack().float()).float()
    single.load_state_dict(exact.state_dict())
    assert_close(single(x.float()), exact(x).float(), rtol=1e-4, atol=1e-5)
    assert_close(model(x.float()), exact(x).float(), rtol=1e-4, atol=1e-5)
    expected = single(x.float())
    for module in single.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.fill_(float("nan"))
    assert torch.equal(single(x.float()), expected)
    with single.disable_adapter():
        assert single(x.float()).isnan().all()
