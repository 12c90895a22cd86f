"""VB-LoRA against arXiv 2405.15179, equation (4): each piece of A and B is sum_{s in TopK} softmax(logits)_s h_s."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from deltatune import PeftModel, VBLoRAConfig, get_peft_model
from deltatune.errors import ConfigError

SIZES = {"r": 2, "num_vectors": 7, "vector_length": 3}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 3, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def adapted(move: bool = True, **options):
    model = get_peft_model(Two().double(), VBLoRAConfig(target_modules=["up", "down"], **{**SIZES, **options})).double()
    torch.manual_seed(1)
    for parameter in model.parameters() if move else ():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


def bank(model):
    return model.get_base_model().shared_by_adapters["default"].vblora_vector_bank


def piece(logits, vectors, k):
    chosen = sorted(range(len(logits)), key=lambda s: -logits[s].item())[:k]
    weights = torch.tensor([logits[s].item() for s in chosen], dtype=torch.float64).softmax(0)
    return sum(weight * vectors[s] for weight, s in zip(weights, chosen))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_pieces_are_mixtures_of_the_k_largest(k):
    model = adapted(topk=k)
    for layer in (model.get_base_model().up, model.get_base_model().down):
        own, (out, width) = layer.adapters["default"], layer.base_layer.weight.shape
        A = torch.stack([torch.cat([piece(logits, bank(model), k) for logits in row]) for row in own.vblora_logits_A])
        mixed_B = [[piece(logits, bank(model), k) for logits in row] for row in own.vblora_logits_B]
        columns = [torch.cat([row[j] for row in mixed_B]) for j in range(2)]
        B = torch.stack(columns, dim=1)
        assert A.shape == (2, width) and B.shape == (out, 2)
        assert_close(layer.stored_weight(["default"]), layer.base_layer.weight + B @ A)
        x = torch.randn(4, width, dtype=torch.float64)
        assert_close(layer(x), layer.base_layer(x) + x @ A.T @ B.T)


def test_counts_and_starts():
    model = adapted(move=False)
    logits = 2 * (6 // 3) * 7 + (9 // 3) * 2 * 7 + 2 * (9 // 3) * 7 + (3 // 3) * 2 * 7
    assert model.get_nb_trainable_parameters()[0] == logits + 7 * 3
    assert bank(model).abs().max() <= 0.02 and bank(model).std() > 0.005
    own = model.get_base_model().up.adapters["default"]
    assert 0.05 < own.vblora_logits_A.std() < 0.2 and isinstance(own.identity_at_birth, str)


def test_the_bank_is_one_and_learns_from_every_layer():
    model = adapted(topk=7)
    model(torch.randn(5, 6, dtype=torch.float64)).square().sum().backward()
    both = bank(model).grad.clone()
    for name in ("up", "down"):
        other = adapted(topk=7)
        getattr(other.get_base_model(), name).adapters["default"].requires_grad_(False)
        other(torch.randn(5, 6, dtype=torch.float64)).square().sum().backward()
        assert bank(other).grad.abs().sum() > 0
    assert both.abs().min() > 0


@pytest.mark.parametrize("k,count", [(1, 7), (2, 300), (3, 7)])
def test_a_file_may_hold_the_choice_alone(k, count, tmp_path):
    options = {"topk": k, "num_vectors": count, "save_only_topk_weights": True}
    model, x = adapted(**options).float(), torch.randn(5, 6)
    with torch.no_grad():  # one piece whose weight is all on one vector, so that nothing is left for the last
        model.get_base_model().up.adapters["default"].vblora_logits_A[0, 0, 4] = 200.0
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    weights = held["base_model.model.up.vblora_logits_A_topk_weights"]
    places = held["base_model.model.up.vblora_logits_A_topk_indices"]
    assert weights.shape == (2, 2, k - 1) and places.shape == (2, 2, k)
    assert places.dtype == (torch.uint8 if count == 7 else torch.int16)
    loaded = PeftModel.from_pretrained(Two(), tmp_path, is_trainable=True)
    assert_close(loaded(x), model(x))
    loaded.save_pretrained(tmp_path / "again")
    assert_close(PeftModel.from_pretrained(Two(), tmp_path / "again")(x), model(x))
    loaded(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in loaded.parameters() if p.requires_grad)


def test_refusals():
    for options, field in (({"topk": 0}, "topk"), ({"topk": 8}, "topk"), ({"num_vectors": 0}, "num_vectors")):
        with pytest.raises(ConfigError) as caught:
            VBLoRAConfig(**{**SIZES, **options})
        assert caught.value.field == field
    with pytest.raises(ConfigError, match=r"vector_length=4 does not divide both sides of up \(9, 6\); 3 does"):
        adapted(vector_length=4)
