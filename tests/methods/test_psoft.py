"""PSOFT against arXiv 2505.11235, section 4: W' = W_res + B diag(b) Q diag(a) A, B A the principal part of W."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from deltatune import PeftModel, PsoftConfig, get_peft_model
from deltatune.errors import ConfigError, MismatchError
from deltatune.methods.psoft import principal


def adapted(layer: nn.Module, scale: float = 0.4, **options):
    torch.manual_seed(0)
    config = PsoftConfig(target_modules=["layer"], **{"r": 3, **options})
    model = get_peft_model(nn.ModuleDict({"layer": layer}).double(), config)
    wrapper = model.get_base_model()["layer"]
    psoft = wrapper.adapters["default"]
    with torch.no_grad():
        for parameter in psoft.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return wrapper, psoft


def skew(entries: Tensor, size: int) -> Tensor:
    Q = torch.zeros(size, size, dtype=entries.dtype)
    k = 0
    for i in range(size):
        for j in range(i + 1, size):
            Q[i, j], Q[j, i] = entries[k], -entries[k]
            k += 1
    return Q


def transformation(psoft) -> Tensor:
    S, eye = skew(psoft.psoft_R.weight, psoft.r), torch.eye(psoft.r, dtype=torch.float64)
    turn = (eye + S) @ torch.linalg.inv(eye - S)
    return torch.diag(psoft.psoft_R.vector_b) @ turn @ torch.diag(psoft.psoft_R.vector_a)


def by_hand(weight: Tensor, R: Tensor, symmetric: bool = False) -> Tensor:
    """The residual stays, the principal part gets R between its factors."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    r = len(R)
    left, right = U[:, :r] @ torch.diag(S[:r]), Vh[:r]
    if symmetric:
        left, right = U[:, :r] @ torch.diag(S[:r].sqrt()), torch.diag(S[:r].sqrt()) @ Vh[:r]
    residual = U[:, r:] @ torch.diag(S[r:]) @ Vh[r:]
    return residual + left @ R @ right


@pytest.mark.parametrize("start", ["psoft_init", "pissa_init"])
def test_the_principal_part_is_transformed_and_the_rest_stays(start):
    wrapper, psoft = adapted(nn.Linear(7, 5), ab_svd_init=start)
    base = wrapper.base_layer
    expected = by_hand(base.weight, transformation(psoft), start == "pissa_init")
    assert_close(wrapper.stored_weight(["default"]), expected)
    x = torch.randn(4, 7, dtype=torch.float64)
    assert_close(wrapper(x), x @ expected.T + base.bias)


def test_convolutions_and_embeddings_are_their_matrices():
    wrapper, psoft = adapted(nn.Conv2d(2, 6, (3, 2)))
    expected = by_hand(wrapper.base_layer.weight.flatten(1), transformation(psoft))
    assert_close(wrapper.stored_weight(["default"]).flatten(1), expected)
    wrapper, psoft = adapted(nn.Embedding(9, 5))
    assert_close(wrapper.stored_weight(["default"]).T, by_hand(wrapper.base_layer.weight.T, transformation(psoft)))


def test_without_scales_the_principal_part_keeps_the_angles_of_its_rows():
    """Which needs a rotation, and a basis A that is orthonormal."""
    wrapper, psoft = adapted(nn.Linear(7, 5), psoft_mag_a=False, psoft_mag_b=False)
    Q = psoft.psoft_R.R
    assert_close(Q @ Q.T, torch.eye(3, dtype=torch.float64))
    assert torch.linalg.det(Q).item() == pytest.approx(1)
    assert_close(psoft.A @ psoft.A.T, torch.eye(3, dtype=torch.float64))
    before, after = psoft.B @ psoft.A, psoft.B @ Q @ psoft.A
    assert_close(after @ after.T, before @ before.T)
    assert not torch.allclose(wrapper.stored_weight(["default"]), wrapper.base_layer.weight)


def test_the_series_and_its_bound():
    _, psoft = adapted(nn.Linear(7, 5), use_cayley_neumann=True, cayley_neumann_eps=0.5)
    S = skew(psoft.psoft_R.weight, 3)
    assert S.norm() > 0.5
    S = S * 0.5 / S.norm()
    assert_close(psoft.psoft_R.Q, torch.eye(3, dtype=torch.float64) + 2 * S + 2 * S @ S + 2 * S @ S @ S + S @ S @ S @ S)
    _, free = adapted(nn.Linear(7, 5), use_cayley_neumann=True, scale=0.01, cayley_neumann_eps=0.5)
    S = skew(free.psoft_R.weight, 3)
    assert_close(free.psoft_R.Q, torch.eye(3, dtype=torch.float64) + 2 * S + 2 * S @ S, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options,count",
    [({}, 3 + 3 + 3), ({"psoft_mag_a": False}, 6), ({"psoft_mag_b": False}, 6), ({"psoft_orth": False}, 15)],
    ids=str,
)
def test_it_trains_half_a_square_and_two_vectors(options, count):
    for layer in (nn.Linear(7, 5), nn.Conv2d(2, 6, 3), nn.Embedding(9, 5)):
        _, psoft = adapted(layer, **options)
        assert sum(p.numel() for p in psoft.parameters()) == count
        assert psoft.file_tensors().keys() == dict(psoft.named_parameters()).keys(), "A and B are not saved"


def test_a_free_matrix_is_what_its_numbers_say():
    wrapper, psoft = adapted(nn.Linear(7, 5), psoft_orth=False, psoft_mag_b=False)
    R = psoft.psoft_R.weight @ torch.diag(psoft.psoft_R.vector_a)
    assert_close(wrapper.stored_weight(["default"]), by_hand(wrapper.base_layer.weight, R))


@pytest.mark.parametrize("options", [{}, {"psoft_orth": False}, {"psoft_svd": "lowrank"}], ids=str)
def test_it_starts_as_the_identity_bit_for_bit(options):
    wrapper, _ = adapted(nn.Linear(7, 5), scale=0, **options)
    x = torch.randn(4, 7, dtype=torch.float64)
    assert torch.equal(wrapper(x), wrapper.base_layer(x))


def test_the_randomised_decomposition_depends_on_its_seed_alone():
    torch.manual_seed(4)
    weight = torch.randn(30, 3) @ torch.randn(3, 40) + 0.01 * torch.randn(30, 40)
    found = []
    for seed, drawn in ((0, 1), (0, 2), (1, 2)):
        torch.manual_seed(drawn)
        before = torch.get_rng_state()
        found.append(principal(weight, PsoftConfig(r=3, psoft_svd="lowrank", random_seed=seed)))
        assert torch.equal(torch.get_rng_state(), before)
    (A, B), again, other = found
    assert torch.equal(A, again[0]) and not torch.equal(A, other[0])
    full = principal(weight, PsoftConfig(r=3))
    assert_close(B @ A, full[1] @ full[0], atol=1e-4, rtol=1e-4)


def test_dropout_is_on_what_the_change_reads():
    wrapper, psoft = adapted(nn.Linear(7, 5), psoft_dropout=0.5)
    x = torch.randn(4, 7, dtype=torch.float64)
    psoft.train()
    psoft.psoft_dropout.p = 1.0
    assert torch.equal(wrapper(x), wrapper.base_layer(x))
    psoft.eval()
    assert not torch.allclose(wrapper(x), wrapper.base_layer(x))


def test_a_rank_that_the_layer_cannot_have_is_refused():
    with pytest.raises(ConfigError, match=r"r=6 .*\(5, 7\).*at most 5"):
        adapted(nn.Linear(7, 5), r=6)
    with pytest.raises(ConfigError, match="pissa_init"):
        PsoftConfig(ab_svd_init="zeros")
    with pytest.raises(ConfigError, match=r"cayley_neumann_eps=1.5"):
        PsoftConfig(cayley_neumann_eps=1.5)


def test_singular_vectors_of_other_signs_are_not_taken_for_those_of_the_file(tmp_path, monkeypatch):
    """As another LAPACK gives them: a rotation between them would turn the other way."""
    bare = lambda: (torch.manual_seed(1), nn.Sequential(nn.Linear(7, 5)))[1]
    get_peft_model(bare(), PsoftConfig(r=3, target_modules=["0"])).save_pretrained(tmp_path)
    PeftModel.from_pretrained(bare(), tmp_path)
    svd, signs = torch.linalg.svd, torch.tensor([1.0, -1, 1, 1, 1])

    def flipped(*args, **kwargs):
        U, S, Vh = svd(*args, **kwargs)
        return U * signs, S, signs[:, None] * Vh

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    with pytest.raises(MismatchError, match=r"psoft_A, psoft_B, derived here"):
        PeftModel.from_pretrained(bare(), tmp_path)
