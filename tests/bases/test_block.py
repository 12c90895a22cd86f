"""Blocks of layers: what comes out of them is adapted, and what is in them keeps its own paths and adapters."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import BottleneckConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from deltatune.errors import MergeError, StateError, TargetError
from deltatune.inject import adapted_layers
from tests.core.tiny import batch, logits, tiny
from tests.laws.examples import adapters, base_values, move, same

INNER = LoraConfig(r=2, target_modules=["q_proj"])


def around(**options) -> BottleneckConfig:
    return BottleneckConfig(**{"size": 4, "target_modules": ["layers"], **options})


def adapted(*configs, arch: str = "llama") -> PeftModel:
    """All of them active, in order."""
    model = get_peft_model(tiny(arch), copy.deepcopy(configs[0]), adapter_name="0")
    for index, config in enumerate(configs[1:], 1):
        model.add_adapter(str(index), copy.deepcopy(config))
    model.set_adapter([str(index) for index in range(len(configs))])
    torch.manual_seed(3)
    for index in range(len(configs)):
        move(model, 0.3, str(index))
    return model


def test_the_name_of_a_list_stands_for_its_members_and_numbers_choose_among_them():
    model = adapted(around())
    assert model.base_model.targeted_module_names == [f"model.layers.{i}" for i in range(3)]
    model = adapted(around(layers_to_transform=[0, 2]))
    assert model.base_model.targeted_module_names == ["model.layers.0", "model.layers.2"]
    with pytest.raises(TargetError, match="layers_to_transform"):
        adapted(around(layers_to_transform=[7]))
    with pytest.raises(TargetError, match="cannot be adapted"):
        get_peft_model(tiny("llama"), LoraConfig(target_modules=["layers"]))


def test_what_comes_out_of_a_block_is_changed_and_the_next_reads_it():
    model, inputs = adapted(around(layers_to_transform=[1], non_linearity="tanh")), batch("llama")
    bare = tiny("llama")
    part = model.get_base_model().model.layers[1].adapters["0"]

    def add(module, args, y):
        bent = torch.tanh(y @ part.adapter_down.weight.T + part.adapter_down.bias)
        return y + bent @ part.adapter_up.weight.T + part.adapter_up.bias

    bare.model.layers[1].register_forward_hook(add)
    assert_close(logits(model, inputs), logits(bare, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch,name", [("t5", "block"), ("gpt2", "h"), ("bert", "layer"), ("bart", "layers")])
def test_blocks_of_any_architecture(arch, name):
    """Tensors or tuples, encoders, decoders, cross-attention; each adapter receives a gradient."""
    model, inputs = adapted(around(target_modules=[name]), arch=arch), batch(arch)
    with model.disable_adapter():
        assert_close(logits(model, inputs), logits(tiny(arch), inputs), rtol=1e-5, atol=1e-5)
    model(**inputs).loss.backward()
    assert len(model.base_model.targeted_module_names) == (4 if arch in ("t5", "bart") else 2)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters(model, "0"))


@pytest.mark.parametrize("order", [(around(), INNER), (INNER, around())])
def test_layers_inside_are_adapted_under_their_own_paths(order, tmp_path):
    model, inputs = adapted(*order), batch("llama")
    expected = logits(model, inputs)
    for name in ("0", "1"):
        keys = model.adapter_tensors(name)
        assert not any("base_layer" in key for key in keys) and len(keys) in (6, 12)
    assert {path for path, _ in adapted_layers(model.get_base_model())} == {
        *(f"model.layers.{i}" for i in range(3)),
        *(f"model.layers.{i}.self_attn.q_proj" for i in range(3)),
    }
    model.save_pretrained(tmp_path)
    for names in (("0", "1"), ("1", "0")):  # loaded in either order, on a base without or with the other
        loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / names[0], names[0])
        loaded.load_adapter(tmp_path / names[1], names[1])
        loaded.set_adapter(list(names))
        assert_close(logits(loaded, inputs), expected)
        assert same(base_values(loaded), base_values(get_peft_model(tiny("llama"), copy.deepcopy(INNER))))
        loaded.delete_adapter(names[0])
        assert len(list(adapted_layers(loaded.get_base_model()))) == 3
        plain = loaded.unload()
        assert_close(logits(plain, inputs), logits(tiny("llama"), inputs))


def test_a_weight_inside_is_merged_around_it_nothing_is():
    model, inputs = adapted(INNER, around()), batch("llama")
    with pytest.raises(MergeError, match=r"model\.layers\.0: .*no weight"):
        model.base_model.merge_adapter()
    model.set_adapter("0")
    expected = logits(model, inputs)
    model.base_model.merge_adapter()
    assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", [0, 1])
def test_a_prefix_finds_its_attentions_in_adapted_blocks(first, tmp_path):
    """And a block that is wrapped later does not hide them."""
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    order = [prefix, around(task_type="CAUSAL_LM")]
    model, inputs = adapted(order[first], order[1 - first]), batch("llama")
    names = {"prefix": str(first), "block": str(1 - first)}
    assert [site.name for site in model.prompts[names["prefix"]].sites] == [
        f"model.layers.{i}.self_attn" for i in range(3)
    ]
    both = logits(model, inputs)
    for name in ("0", "1"):
        model.set_adapter(name)
        assert not torch.allclose(logits(model, inputs), both, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / names["prefix"], "p")
    loaded.load_adapter(tmp_path / names["block"], "b")
    loaded.set_adapter(["p", "b"])
    assert_close(logits(loaded, inputs), both)
    model.set_adapter(names["block"])
    model.delete_adapter(names["prefix"])
    loaded.delete_adapter("b")


def test_rows_of_a_batch_may_have_different_blocks():
    model, inputs = adapted(around(), around()), {**batch("llama", rows=3)}
    inputs.pop("labels")
    mixed = model(**inputs, adapter_names=["1", "__base__", "0"]).logits
    for row, name in enumerate(["1", "__base__", "0"]):
        alone = model(**{key: value[row : row + 1] for key, value in inputs.items()}, adapter_names=[name]).logits
        assert_close(mixed[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant):
    found = []
    for checkpointing in (False, True):
        model = adapted(around(), INNER).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch("llama"), use_cache=False).loss.backward()
        found.append([p.grad for p in adapters(model, "0")])
    for one, other in zip(*found):
        assert_close(one, other)


def test_generation_with_a_cache_is_generation_without():
    model, ids = adapted(around()), torch.tensor([[5, 9, 12, 4]])
    with_cache, without = (model.generate(input_ids=ids, max_new_tokens=6, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache, without)


class Mixed(nn.Module):
    """A block whose input is of another width than its output."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 4), nn.Tanh())

    def forward(self, x):
        return self.block(x)


def test_a_block_of_other_libraries_and_one_that_cannot_be_read():
    model = get_peft_model(Mixed(), around(target_modules=["block"]))
    assert model.get_base_model().block.adapters["default"].adapter_up.weight.shape == (4, 4)
    assert model(torch.randn(2, 6)).shape == (2, 4)
    model.add_adapter("other", around(target_modules=["block"], size=2))  # told from the block, not from its adapter
    assert model.get_base_model().block.adapters["other"].adapter_up.weight.shape == (4, 2)
    model = get_peft_model(Mixed(), around(target_modules=["block"], parallel=True))
    with pytest.raises(StateError, match="width 6, not 4"):
        model(torch.randn(2, 6))
