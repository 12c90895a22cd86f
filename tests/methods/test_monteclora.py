"""MonteCLoRA against arXiv 2411.04358: in training A is drawn around its mean; the loss holds a divergence."""

import copy

import pytest
import torch
from torch import nn
from torch.distributions import Dirichlet, MultivariateNormal, kl_divergence
from torch.testing import assert_close

from deltatune import LoraConfig, MontecloraConfig, MontecloraTrainerMixin, PeftModel, get_peft_model
from deltatune.errors import ConfigError
from tests.core.tiny import batch, tiny


def adapted(layer: nn.Module | None = None, r: int = 3, lora: dict | None = None, **options):
    torch.manual_seed(0)
    layer = nn.Linear(7, 6) if layer is None else layer
    options = {"num_samples": 4, "sample_scaler": 0.5, **options}
    config = LoraConfig(
        target_modules=["layer"], r=r, lora_alpha=6, monteclora_config=MontecloraConfig(**options), **lora or {}
    )
    model = get_peft_model(nn.ModuleDict({"layer": layer.double()}), config).double()
    wrapper = model.get_base_model()["layer"]
    adapter = wrapper.adapters["default"]
    nn.init.normal_(adapter.lora_B.weight)
    return model, wrapper, adapter


def test_in_evaluation_it_is_lora_with_the_mean():
    _, wrapper, lora = adapted()
    wrapper.eval()
    x = torch.randn(5, 7, dtype=torch.float64)
    expected = wrapper.base_layer(x) + 2 * x @ lora.lora_A.weight.T @ lora.lora_B.weight.T
    assert_close(wrapper(x), expected)
    assert torch.equal(wrapper(x), wrapper(x))
    merged = wrapper.train().merged_parameters(["default"], check=True)
    assert_close(merged.weight, wrapper.base_layer.weight + 2 * lora.lora_B.weight @ lora.lora_A.weight)


def draw_of_the_paper(sampler, A, count: int) -> torch.Tensor:
    """Sample by sample: v from the Wishart distribution, w in the simplex, one Gaussian matrix for each of them."""
    r, k = len(sampler.std_prior), len(sampler.expert_weights_prior)
    a = sampler.expert_weights_prior.exp()
    found = []
    for _ in range(count):
        square = torch.randn(r, r, dtype=A.dtype)
        wishart = square @ square.T  # of r degrees of freedom and the identity
        std = torch.diag(sampler.std_prior.exp())
        v = (std @ wishart @ std.T).diag().clamp_min(1e-3)
        spread = torch.diag((1 - 2 / k) / a + (1 / a).sum() / k**2)
        logits = torch.linalg.cholesky(spread) @ torch.randn(k, dtype=A.dtype) + a.log() - a.log().mean()
        w = logits.softmax(0)
        found.append(sum(w[i] * (A + sampler.scale * v.sqrt()[:, None] * torch.randn_like(A)) for i in range(k)))
    return torch.stack(found)


def test_a_is_drawn_as_the_papers_mixture():
    """One matrix is drawn instead of one per sample; its distribution is the same: mean, spread, fourth moment."""
    _, _wrapper, lora = adapted()
    sampler, A = lora.lora_monteclora_sampler, lora.lora_A.weight.detach()
    nn.init.normal_(sampler.std_prior, std=0.5)
    nn.init.normal_(sampler.expert_weights_prior)
    with torch.no_grad():
        ours = torch.stack([sampler.sample(A) for _ in range(6000)]) - A
        theirs = draw_of_the_paper(sampler, A, 6000) - A
    assert ours.mean(dim=0).abs().max() < 0.05 and theirs.mean(dim=0).abs().max() < 0.05
    for power in (2, 4):
        one, other = ours.pow(power).mean(dim=(0, 2)), theirs.pow(power).mean(dim=(0, 2))
        assert_close(one, other, rtol=0.06 * power, atol=0)


def test_training_draws_anew_and_its_gradient_reaches_everything():
    _, wrapper, lora = adapted()
    wrapper.train()
    x = torch.randn(5, 7, dtype=torch.float64)
    first = wrapper(x)
    assert not torch.equal(first, wrapper(x))
    wrapper(x).square().sum().backward()
    for name, parameter in lora.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_one_draw_serves_a_whole_pass():
    """With DoRA the lengths are those of the A that was drawn."""
    _, wrapper, lora = adapted(lora={"use_dora": True})
    wrapper.train()
    x = torch.eye(7, dtype=torch.float64)
    got = wrapper(x) - wrapper.base_layer.bias
    assert_close(got.T.norm(dim=1), lora.lora_magnitude_vector.weight.abs())


def test_the_divergences_are_those_of_the_distributions():
    _, wrapper, lora = adapted(kl_loss_weight=1.0, dirichlet_prior=0.3)
    sampler = lora.lora_monteclora_sampler
    nn.init.normal_(sampler.std_prior)
    nn.init.normal_(sampler.expert_weights_prior)
    a = sampler.expert_weights_prior.exp()
    of_weights = kl_divergence(Dirichlet(a), Dirichlet(torch.full_like(a, 0.3)))
    V = torch.diag(sampler.std_prior.exp() ** 2)
    r = 3  # degrees of freedom and size; see for example https://arxiv.org/abs/1401.0852
    of_spread = r / 2 * (V.trace() - torch.logdet(V) - r)
    assert_close(lora.penalty(), of_weights + of_spread)
    wrapper.train()
    wrapper(torch.randn(5, 7, dtype=torch.float64))
    zero = torch.zeros(3, dtype=torch.float64)
    v = sampler.gaussian_var_prior
    one = MultivariateNormal(zero, v)
    of_samples = 4 * kl_divergence(one, MultivariateNormal(zero, torch.eye(3, dtype=zero.dtype)))
    assert_close(lora.penalty(), of_weights + of_spread + of_samples)
    grads = torch.autograd.grad(lora.penalty(), list(sampler.parameters()))
    assert all(grad.abs().max() > 0 for grad in grads)


def test_with_use_entropy_the_squares_of_the_weights_are_in_the_loss():
    _, wrapper, lora = adapted(use_entropy=True, kl_loss_weight=0.0)
    wrapper.train()
    wrapper(torch.randn(5, 7, dtype=torch.float64))
    w = lora.lora_monteclora_sampler.expert_weights
    assert w.sum().item() == pytest.approx(1)
    assert_close(lora.penalty(), w.square().sum())


def small(**options):
    config = LoraConfig(r=2, target_modules=["q_proj"], monteclora_config={"kl_loss_weight": 0.1, **options})
    torch.manual_seed(0)
    return get_peft_model(tiny("llama"), config).train()


def test_the_loss_of_a_pass_holds_the_mean_over_the_layers():
    model = small()
    torch.manual_seed(1)
    loss = model(**batch("llama")).loss
    parts = [m.adapters["default"].variants[0] for m in model.modules() if hasattr(m, "adapters")]
    divergence = torch.stack([0.1 * part.lora_monteclora_sampler.divergence() for part in parts]).mean()
    torch.manual_seed(1)
    logits = model.get_base_model()(**batch("llama")).loss
    assert_close(loss - logits, divergence, rtol=1e-4, atol=1e-5)


def test_checkpointing_draws_the_same_again():
    def gradients(model):
        torch.manual_seed(1)
        model(**batch("llama")).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = small(sample_scaler=0.5), small(sample_scaler=0.5)
    checkpointed.gradient_checkpointing_enable()
    one, other = gradients(plain), gradients(checkpointed)
    for name in one:
        assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def test_files_hold_the_sampler_and_a_copy_is_independent(tmp_path):
    model = small()
    model(**batch("llama"))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    one, other = model.adapter_tensors("default"), again.adapter_tensors("default")
    assert sum("lora_monteclora_sampler" in key for key in one) == 4 * 3
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    twin = copy.deepcopy(model)
    twin.eval(), model.eval()
    with torch.no_grad():
        assert torch.equal(twin(**batch("llama")).logits, model(**batch("llama")).logits)


class Loss:
    """The one verb of a trainer that the mixin extends."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs["labels"]
        outputs = model(**inputs) if self.models else model(input_ids=inputs["input_ids"])
        loss = outputs.loss if self.models else outputs.logits[:, 0].logsumexp(-1).mean() + 0 * labels.sum()
        return (loss, outputs) if return_outputs else loss


class Trainer(MontecloraTrainerMixin, Loss):
    def __init__(self, models: bool) -> None:
        self.models = models


@pytest.mark.parametrize("models", [True, False])
def test_the_mixin_adds_the_penalty_where_the_trainer_makes_its_own_loss_and_never_twice(models):
    model = small(sample_scaler=1e-9)
    inputs = dict(batch("llama"))
    for _ in range(2):
        torch.manual_seed(1)
        loss, outputs = Trainer(models).compute_loss(model, inputs, return_outputs=True)
        penalty = model.penalty()
        plain = get_plain(model, inputs, models)
        assert_close(loss - plain, penalty, rtol=1e-3, atol=1e-4)
        assert outputs.logits is not None
    model.eval()
    assert_close(Trainer(models).compute_loss(model, inputs), get_plain(model, inputs, models), rtol=1e-4, atol=1e-4)


def get_plain(model, inputs, models):
    with torch.no_grad():
        outputs = model(**inputs)
        return outputs.loss if models else outputs.logits[:, 0].logsumexp(-1).mean()


def test_wrong_values_are_refused():
    for field, value in [("num_samples", 0), ("dirichlet_prior", -1), ("sample_scaler", 0), ("kl_loss_weight", -1)]:
        with pytest.raises(ConfigError, match=f"MontecloraConfig: {field}={value}"):
            MontecloraConfig(**{field: value})
