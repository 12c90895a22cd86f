"""AdaMSS against its paper (NeurIPS 2025, OpenReview 8ZdWmpYxT0): rows of U in clusters, W_k' = W_k + B_k A_k V^T."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import deltatune
from deltatune import AdamssConfig, get_peft_model
from deltatune.clusters import k_means
from deltatune.errors import ConfigError, MismatchError
from deltatune.methods.adamss import _left, _singular


def adapted(layer: nn.Module, shake: bool = True, **options):
    torch.manual_seed(0)
    config = AdamssConfig(**{"target_modules": ["layer"], "r": 6, "num_subspaces": 3, **options})
    model = get_peft_model(nn.ModuleDict({"layer": layer}).double(), config)
    wrapper = model.get_base_model()["layer"]
    made = wrapper.adapters["default"]
    if shake:
        for parameter in made.parameters():
            nn.init.normal_(parameter)
    return model, wrapper, made


def left(full: torch.Tensor) -> torch.Tensor:
    return _singular(full.float(), 6, 0)[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 2])
def test_every_cluster_of_rows_gets_an_update_of_its_own(bias, rank):
    _, wrapper, made = adapted(nn.Linear(15, 11, bias=bias), subspace_rank=rank)
    W = wrapper.base_layer.weight.detach()
    full = torch.cat([W, wrapper.base_layer.bias.detach()[:, None]], dim=1) if bias else W
    labels = k_means(left(full), 3)
    expected = full.clone()
    for k in range(3):
        rows = torch.where(labels == k)[0]
        A, B = made.adamss_A[k].detach(), made.adamss_B[k].detach()
        assert A.shape == (min(rank, len(rows)), 6) and B.shape == (len(rows), len(A))
        for place, row in enumerate(rows):
            expected[row] += B[place] @ A @ made.adamss_newB
    x = torch.randn(7, 15, dtype=torch.float64)
    ones = torch.cat([x, torch.ones(7, 1, dtype=torch.float64)], dim=1) if bias else x
    assert_close(wrapper(x), ones @ expected.T)
    assert_close(wrapper.as_map(["default"]).weight, expected[:, :15])
    assert not bias or torch.allclose(wrapper.as_map(["default"]).bias, expected[:, 15])


def test_the_frozen_rows_are_singular_directions_of_weight_and_bias():
    _, wrapper, made = adapted(nn.Linear(15, 11), r=10, random_seed=4)
    full = torch.cat([wrapper.base_layer.weight, wrapper.base_layer.bias[:, None]], dim=1).detach()
    V = made.adamss_newB
    assert V.shape == (10, 16) and not V.requires_grad
    assert_close(V @ V.T, torch.eye(10, dtype=torch.float64), atol=1e-5, rtol=0)
    exact = torch.linalg.svd(full, full_matrices=False).Vh
    assert_close((V[:5] @ exact[:5].T).abs().diagonal(), torch.ones(5, dtype=torch.float64), atol=0.02, rtol=0)


def test_counts_and_the_start():
    model, wrapper, made = adapted(nn.Linear(15, 11), shake=False)
    assert model.get_nb_trainable_parameters()[0] == 3 * 6 + 11  # K r + out, at rank 1
    x = torch.randn(4, 15, dtype=torch.float64)
    assert torch.equal(wrapper(x), wrapper.base_layer(x)) and not torch.cat(list(made.adamss_B)).any()
    for A in made.adamss_A:  # the first direction in which the rows of the cluster lie
        assert A.norm().item() == pytest.approx(1, abs=1e-5)
    _, wrapper, _ = adapted(nn.Linear(15, 11), shake=False, init_weights=None)
    assert not torch.allclose(wrapper(x), wrapper.base_layer(x))


def test_the_dynamic_rank_counts_singular_values_above_the_threshold():
    _, _, made = adapted(nn.Linear(15, 11), subspace_rank=4, use_dynamic_rank=True, svd_threshold=0.3)
    U = left(torch.cat([made.layer.weight, made.layer.bias[:, None]], dim=1))
    labels = k_means(U, 3)
    for k in range(3):
        gram = U[labels == k] @ U[labels == k].T
        values = torch.linalg.eigvalsh(gram)
        wanted = max(1, min(4, int((values > 0.3 * values.max()).sum())))
        assert made.adamss_A[k].shape[0] == wanted
    assert {len(A) for A in made.adamss_A} != {4}, "the threshold decides nowhere"


def test_sizes_beyond_the_layer_are_cut():
    _, _, made = adapted(nn.Linear(4, 3), r=100, num_subspaces=9, subspace_rank=7)
    assert made.adamss_newB.shape == (3, 5) and made.num_subspaces == 3
    assert all(B.shape == (1, 1) for B in made.adamss_B)


def test_left_vectors_are_found_again_from_the_right_ones():
    """PEFT's files hold V alone, and on another device the random projection was another."""
    for shape, r in (((40, 30), 8), ((30, 40), 8), ((33, 33), 12)):
        W = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        U, V = _singular(W, r, 9)
        assert_close(_left(W, V), U, atol=1e-4, rtol=0)


def test_the_same_clusters_in_every_run_and_beside_other_random_numbers():
    torch.manual_seed(1)
    layer = nn.Linear(15, 11)
    first = adapted(layer)[2].adamss_rows
    torch.manual_seed(2)
    before = torch.get_rng_state()
    config = AdamssConfig(r=6, num_subspaces=3, target_modules=["layer"])
    again = get_peft_model(nn.ModuleDict({"layer": layer}), config)
    assert torch.equal(again.get_base_model()["layer"].adapters["default"].adamss_rows, first)
    assert torch.equal(torch.get_rng_state(), before)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 9)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def allocated(steps: int, begin: int = 1, model=None, **options):
    """A loop of one's own; for each step the gradients, the updated values, and which clusters still train after it."""
    torch.manual_seed(0)
    plan = {"use_asa": True, "asa_target_subspaces": 3, "init_warmup": 2, "final_warmup": 12, "mask_interval": 4}
    config = AdamssConfig(r=5, num_subspaces=4, target_modules=["first", "second"], **{**plan, **options})
    model = model or get_peft_model(Net(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    seen, training = [], []
    for step in range(begin, begin + steps):
        torch.manual_seed(step)
        x = torch.randn(16, 8)
        (model(x)[:, :8] - x).square().mean().backward()
        optimizer.step()
        values = {n: (p.detach().clone(), p.grad) for n, p in model.named_parameters() if p.grad is not None}
        seen.append({n: (value, grad.clone()) for n, (value, grad) in values.items()})
        model.after_step()
        training.append([n for n, p in model.named_parameters() if p.requires_grad])
        optimizer.zero_grad()
    return model, seen, training


def test_the_clusters_that_matter_most_go_on_training():
    """|w g| smoothed by 0.85, and how much it varies; the sum of the means of both products, over all layers."""
    model, seen, training = allocated(14)
    begin, end, total, target = 2, 12, 8, 3
    expected = set(training[0])
    for step in range(1, 15):
        if begin <= step <= end and step % 4 == 0:
            window = range(max(begin, step - 3), step + 1)
            scores = {}
            for name in expected:
                mean = spread = 0.0
                for at in window:
                    value, grad = seen[at - 1][name]
                    now = (value * grad).abs()
                    mean = 0.85 * mean + 0.15 * now
                    spread = 0.85 * spread + 0.15 * (now - mean).abs()
                cluster = name.replace("adamss_A", "*").replace("adamss_B", "*")
                scores[cluster] = scores.get(cluster, 0) + (mean * spread).mean().item()
            budget = int(target + (total - target) * (1 - (step - begin) / (end - begin)) ** 3)
            kept = sorted(scores, key=scores.get, reverse=True)[:budget]
            expected = {n for n in expected if n.replace("adamss_A", "*").replace("adamss_B", "*") in kept}
            assert len(expected) == 2 * min(budget, len(scores))
        assert set(training[step - 1]) == expected
    assert len(expected) == 2 * target
    still = [n for n in training[0] if n not in expected]
    last = dict(model.named_parameters())
    assert any(last[n].any() for n in still if "adamss_B" in n), "what was learnt stays"


def test_dropped_clusters_stay_dropped_and_come_back_from_a_checkpoint():
    from deltatune.schedule import pack, unpack

    model, _, training = allocated(9)
    model.set_adapter("default")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == training[-1]
    other, _, _ = allocated(0)
    other.load_state_dict(model.state_dict())
    unpack(other.base_model.schedules, *pack(model.base_model.schedules))
    for one in (model, other):
        _, _, training = allocated(4, begin=10, model=one)
        assert len(training[-1]) == 2 * 3
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_without_allocation_there_is_no_schedule():
    assert not allocated(3, use_asa=False)[0].base_model.schedules


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mask_interval": 0}, "mask_interval=0"),
        ({"init_warmup": 9, "final_warmup": 9}, "init_warmup=9.*below final_warmup=9"),
        ({"asa_target_subspaces": 0}, "asa_target_subspaces=0"),
        ({"asa_schedule_exponent": 0.0}, "asa_schedule_exponent"),
        ({"asa_importance_beta": 1.0}, "asa_importance_beta"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_by_field(options, named):
    with pytest.raises(ConfigError, match=named):
        AdamssConfig(use_asa=True, **options)


def test_a_target_above_all_subspaces_is_told():
    with pytest.warns(deltatune.errors.PeftWarning, match="asa_target_subspaces=50 is not less than the 8 subspaces"):
        allocated(0, asa_target_subspaces=50)


def test_old_files_that_say_false_mean_none():
    assert AdamssConfig(init_weights=False).init_weights is None
    with pytest.raises(ConfigError, match="init_weights='gaussian'"):
        AdamssConfig(init_weights="gaussian")


def test_a_base_with_other_singular_directions_is_refused(tmp_path):
    def base():
        torch.manual_seed(5)
        return nn.ModuleDict({"layer": nn.Linear(15, 11)})

    model = get_peft_model(base(), AdamssConfig(r=6, num_subspaces=3, target_modules=["layer"]))
    model.save_pretrained(tmp_path)
    other = base()
    other["layer"].weight.data[0, 1] = 20.0  # which the fingerprint of the base does not sample
    with pytest.raises(MismatchError, match=r"another base|derived here"):
        deltatune.PeftModel.from_pretrained(other, tmp_path)


class TestClusters:
    def test_separate_groups_are_found(self):
        torch.manual_seed(0)
        centers = torch.tensor([[0.0, 9.0], [9.0, 0.0], [-9.0, -9.0]])
        truth = torch.arange(60) % 3
        labels = k_means(centers[truth] + 0.1 * torch.randn(60, 2), 3)
        assert len({(int(a), int(b)) for a, b in zip(truth, labels)}) == 3

    def test_a_cluster_that_loses_all_rows_gets_one(self):
        rows = torch.tensor([[0.0], [0.0], [0.0], [0.0], [1.0], [5.0]])
        assert len(set(k_means(rows, 3).tolist())) == 3
