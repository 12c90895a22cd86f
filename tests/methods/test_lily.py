"""Lily against arXiv 2407.09946, section 3: A of neighbouring layers, experts B_e of all, mixed by a router per input.

The paper's x is one sequence of N tokens; the router's choices are averaged over them, not over the batch.
"""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import LilyConfig, PeftModel, get_peft_model
from deltatune.errors import ConfigError, MergeError
from deltatune.inject import adapted_layers
from tests.core.tiny import TASKS, batch, logits, tiny
from tests.laws.examples import adapters, move


class Deep(nn.Module):
    """Five layers of one kind and shape, one of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"layer": nn.Linear(6, 6)}) for _ in range(5)])
        self.head = nn.ModuleDict({"layer": nn.Linear(6, 4)})

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block["layer"](x))
        return self.head["layer"](x)


def adapted(moved: bool = True, **options):
    torch.manual_seed(0)
    config = LilyConfig(target_modules=["layer"], **{"r": 2, "num_B": 3, "stride_A": 2, **options})
    model = get_peft_model(Deep(), config).double().eval()
    if moved:
        move(model, 0.7)
    return model


def equation(wrapper, x: torch.Tensor) -> torch.Tensor:
    """Of one sequence (N, in): the weights w of the experts, then the mixture, number by number."""
    part = wrapper.adapters["default"]
    A, B, R = part.lily_A.weight, part.lily_B.weight, part.lily_router.weight
    experts = [B[e * part.r : (e + 1) * part.r] for e in range(part.num_B)]
    w = torch.stack([torch.softmax(R @ (A @ token), dim=0) for token in x]).mean(0)
    mixture = sum(w[e] * experts[e] for e in range(part.num_B))
    return wrapper.base_layer(x) + part.scaling * torch.stack([mixture.T @ (A @ token) for token in x])


@pytest.mark.parametrize("scaling", [1.0, 0.3])
def test_each_row_is_the_equation_of_the_paper(scaling):
    model = adapted(scaling=scaling)
    layer, x = model.get_base_model().blocks[1]["layer"], torch.randn(3, 5, 6, dtype=torch.float64)
    for rows in (x, x[:, :1]):  # of one token each, too, for which B is not mixed beforehand
        for row in range(3):
            assert_close(layer(rows)[row], equation(layer, rows[row]))
    flat = torch.randn(4, 6, dtype=torch.float64)  # without an axis of tokens each row is one
    for row in range(4):
        assert_close(layer(flat)[row], equation(layer, flat[row : row + 1])[0])
    assert_close(layer(flat[0]), layer(flat)[0])
    images = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    assert_close(layer(images)[1].flatten(0, 1), equation(layer, images[1].flatten(0, 1)))


def test_layers_share_as_stride_and_kind_say():
    model = adapted()
    parts = [layer.adapters["default"] for _, layer in adapted_layers(model.get_base_model())]
    A, B = [id(part.lily_A) for part in parts], [id(part.lily_B) for part in parts]
    assert [A.index(a) for a in A] == [0, 0, 2, 2, 4, 5] and [B.index(b) for b in B] == [0, 0, 0, 0, 0, 5]
    assert len({id(part.lily_router) for part in parts}) == 6
    # 4 A, 2 stacks of 3 experts, 6 routers
    assert model.get_nb_trainable_parameters()[0] == 4 * 2 * 6 + 3 * 2 * (6 + 4) + 6 * 3 * 2
    assert len({id(p) for p in adapters(model)}) == len(adapters(model)) == 4 + 2 + 6


def test_different_names_share_nothing():
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama"), LilyConfig(target_modules=["q_proj", "o_proj"], r=2, stride_A=3))
    parts = {path: layer.adapters["default"] for path, layer in adapted_layers(model.get_base_model())}
    assert len({id(part.lily_A) for part in parts.values()}) == len({id(part.lily_B) for part in parts.values()}) == 2
    pattern = get_peft_model(tiny("llama"), LilyConfig(target_modules=r".*\.(q_proj|o_proj)", r=2, stride_A=3))
    parts = {path: layer.adapters["default"] for path, layer in adapted_layers(pattern.get_base_model())}
    assert len({id(part.lily_A) for part in parts.values()}) == 2 and len({id(p.lily_B) for p in parts.values()}) == 1
    whole = get_peft_model(tiny("llama"), LilyConfig(target_modules="all-linear", r=2, stride_A=3))
    parts = {path: layer.adapters["default"] for path, layer in adapted_layers(whole.get_base_model())}
    assert len(parts) == 21 and len({id(part.lily_B) for part in parts.values()}) == 7


def test_the_file_holds_what_is_shared_once(tmp_path):
    model = adapted()
    keys = sorted(model.adapter_tensors("default"))
    assert [key.split("model.", 2)[-1] for key in keys if "lily_A" in key] == [
        *(f"blocks.{i}.layer.lily_A.weight" for i in (0, 2, 4)),
        "head.layer.lily_A.weight",
    ]
    assert [key for key in keys if "lily_B" in key] == [
        "base_model.model.blocks.0.layer.lily_B.weight",
        "base_model.model.head.layer.lily_B.weight",
    ]
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = Deep().double()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), model(x))


def test_starts_and_refusals():
    model, x = adapted(moved=False), torch.randn(3, 5, 6, dtype=torch.float64)
    with model.disable_adapter():
        expected = model(x)
    assert torch.equal(model(x), expected)
    assert not torch.allclose(adapted(moved=False, init_weights=False)(x), expected)
    with pytest.raises(ConfigError, match="num_B=1"):
        LilyConfig(num_B=1)
    with pytest.raises(ConfigError, match="stride_A=0"):
        LilyConfig(stride_A=0)
    with pytest.raises(MergeError, match="each row has a mixture of its own"):
        model.base_model.merge_adapter()


@pytest.mark.parametrize("arch", ["llama", "bert", "t5"])
def test_neither_neighbours_nor_padding_change_a_row(arch):
    names = {"llama": ["q_proj", "down_proj"], "bert": ["query", "dense"], "t5": ["q", "k", "wo"]}[arch]
    model = get_peft_model(tiny(arch), LilyConfig(task_type=TASKS[arch], target_modules=names, r=2)).eval()
    torch.manual_seed(1)
    move(model, 0.7)
    inputs = {key: value for key, value in batch(arch, rows=3).items() if key != "labels"}
    if arch == "t5":
        inputs["decoder_input_ids"] = torch.tensor([[0, 4, 9]] * 3)
    mixed = logits(model, inputs)
    for row, length in enumerate([5, 7, 7]):  # the first row is padded on its right
        alone = {key: value[row : row + 1, :length] for key, value in inputs.items()}
        found = logits(model, alone)[0]
        assert_close(found, mixed[row] if arch == "bert" else mixed[row, : len(found)], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(**{**inputs, "attention_mask": torch.ones(3, 7)}).logits[0], mixed[0], atol=1e-3)


def test_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        model = get_peft_model(tiny("llama"), LilyConfig(task_type="CAUSAL_LM", r=2, stride_A=2)).train()
        torch.manual_seed(1)
        move(model, 0.5)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch("llama"), use_cache=False).loss.backward()
        found.append([p.grad for p in adapters(model)])
    for one, other in zip(*found):
        assert_close(one, other)
