"""Batches whose rows use many adapters: each row as if it were alone, the layer run once, nothing kept or stale."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import BottleneckConfig, HRAConfig, IA3Config, LoraConfig, RoadConfig, get_peft_model
from deltatune.helpers.scale import rescale_adapter_scale
from deltatune.inject import adapter_tensors
from tests.core.tiny import tiny
from tests.laws.examples import Holder, move

RANKS = (1, 2, 4, 8)
NAMES = [f"a{number}" for number in range(16)]


def sixteen(dropout: float = 0.0) -> nn.Module:
    """LoRAs of four ranks, each with an alpha of its own, on a linear layer 12 -> 8."""
    torch.manual_seed(0)
    model = None
    for number, name in enumerate(NAMES):
        config = LoraConfig(
            r=RANKS[number % 4], lora_alpha=1 + number, lora_dropout=dropout, target_modules=["layer"],
            lora_bias=number in (3, 7), use_rslora=number % 3 == 0,
        )  # fmt: skip
        if model is None:
            model = get_peft_model(Holder(nn.Linear(12, 8)).eval(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        move(model, name=name)
    return model


def alone(model, x, names):
    """The rows one by one, each with its adapter as the active one."""
    found = []
    for row, name in zip(x, names):
        if name == "__base__":
            with model.disable_adapter():
                found.append(model(row[None]))
        else:
            model.set_adapter(name)
            found.append(model(row[None]))
    return torch.cat(found)


@pytest.mark.parametrize(
    "names",
    [
        NAMES,
        NAMES[::-1],
        ["a0"] * 9 + ["a4"] + ["a8"] * 3 + ["__base__"] * 2,
        ["__base__", *NAMES, "__base__", *NAMES[3:7]],
        ["a0", "a4", "a8", "a12"] * 2,
    ],
)
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (0, 12)])
def test_rows_of_many_loras_of_unequal_ranks_equal_each_alone(names, shape):
    model, x = sixteen(), torch.randn(len(names), *shape)
    assert_close(model(x, adapter_names=names), alone(model, x, names), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_whole_model_equal_each_alone(dtype):
    configs = [LoraConfig(task_type="CAUSAL_LM", r=2 + number % 3, target_modules="all-linear") for number in range(6)]
    model = get_peft_model(tiny("llama").to(dtype), configs[0], adapter_name="a0").eval()
    for number, config in enumerate(configs[1:], 1):
        model.add_adapter(f"a{number}", config)
    move(model, scale=0.05)
    ids, names = torch.randint(3, 61, (8, 5)), ["a0", "a1", "a2", "a3", "a4", "a5", "__base__", "a0"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        for row, name in enumerate(names):
            expected = model(input_ids=ids[row : row + 1], adapter_names=[name]).logits
            tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
            assert_close(mixed[row : row + 1], expected, **tolerance)


def test_rows_of_any_methods_share_one_run_of_the_layer():
    configs = {
        "lora": LoraConfig(r=2), "lora2": LoraConfig(r=2, lora_alpha=3), "ia3": IA3Config(), "ia32": IA3Config(),
        "road": RoadConfig(group_size=4), "road2": RoadConfig(group_size=4), "bend": BottleneckConfig(size=3),
        "bend2": BottleneckConfig(size=3), "hra": HRAConfig(r=2),
    }  # fmt: skip
    model = None
    for name, config in configs.items():
        config.target_modules = {"layer"}
        if model is None:
            model = get_peft_model(Holder(nn.Linear(12, 8)).eval(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        move(model, name=name)
    names = [*configs, "__base__", *reversed(configs)]
    x = torch.randn(len(names), 3, 12)
    expected, sizes = alone(model, x, names), []
    model.get_base_model().layer.base_layer.register_forward_hook(lambda m, args, y: sizes.append(len(args[0])))
    assert_close(model(x, adapter_names=names), expected, rtol=1e-4, atol=1e-5)
    assert sorted(sizes) == [2, len(names)]  # once for all, once for what reflects its input


def test_gradients_of_a_mixed_batch_are_those_of_its_rows():
    model, names = sixteen(), [*NAMES, "__base__", *NAMES[:5]]
    x = torch.randn(len(names), 5, 12)

    def gradients(run):
        model.zero_grad()
        run().square().sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if "lora" in name}

    model.set_requires_grad(NAMES)
    mixed = gradients(lambda: model(x, adapter_names=names))
    model.zero_grad()
    for row, name in zip(x, names):
        model(row[None], adapter_names=[name]).square().sum().backward() if name != "__base__" else None
    each = {name: parameter.grad for name, parameter in model.named_parameters() if "lora" in name}
    assert mixed.keys() == each.keys() and len(mixed) > 32
    for name, grad in mixed.items():
        assert_close(grad, each[name], rtol=1e-4, atol=1e-5)


def test_a_block_that_rescales_reaches_every_row():
    model, x = sixteen(), torch.randn(16, 5, 12)
    base = model(x, adapter_names=["__base__"] * 16)
    whole = model(x, adapter_names=NAMES)
    with rescale_adapter_scale(model, 0.5):
        assert_close(model(x, adapter_names=NAMES), (base + whole) / 2)
        with model.fixed_adapters(), torch.no_grad():
            assert_close(model(x, adapter_names=NAMES), (base + whole) / 2)
    assert torch.equal(model(x, adapter_names=NAMES), whole)


def test_dropout_drops_in_training_only():
    model = sixteen(dropout=0.5)
    x = torch.randn(16, 5, 12)
    still = model(x, adapter_names=NAMES)
    assert torch.equal(model(x, adapter_names=NAMES), still)
    model.train()
    assert not torch.equal(model(x, adapter_names=NAMES), model(x, adapter_names=NAMES))


@pytest.mark.parametrize("change", ["data", "in place", "parameter", "rank", "scaling", "replaced"])
def test_a_change_of_an_adapter_is_seen_at_once(change):
    model, x = sixteen(), torch.randn(16, 5, 12)
    with torch.no_grad():
        before = model(x, adapter_names=NAMES)
        adapter = model.get_base_model().layer.adapters["a6"]
        if change == "data":
            adapter.lora_B.weight.data.mul_(2)
        elif change == "in place":
            adapter.lora_B.weight.mul_(2)
        elif change == "parameter":
            adapter.lora_B.weight = nn.Parameter(2 * adapter.lora_B.weight)
        elif change == "rank":
            for factor, axis in ((adapter.lora_A, 0), (adapter.lora_B, 1)):
                factor.weight = nn.Parameter(torch.cat([factor.weight, factor.weight], axis))
        elif change == "scaling":
            adapter.scaling *= 2
        else:
            model.delete_adapter("a6")
            model.add_adapter("a6", LoraConfig(r=3, target_modules=["layer"], init_lora_weights=False))
        after = model(x, adapter_names=NAMES)
        assert_close(after, alone(model, x, NAMES), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after[6], before[6])


def test_generate_equals_each_row_alone_and_keeps_nothing():
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    model = get_peft_model(tiny("llama"), config, adapter_name="a0").eval()
    for number in range(1, 4):
        model.add_adapter(f"a{number}", copy.deepcopy(config))
    move(model, scale=0.3)
    ids, names = torch.randint(3, 61, (4, 3)), ["a0", "a1", "a2", "a3"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mixed = model.generate(input_ids=ids, adapter_names=names, **options)
    for row, name in enumerate(names):
        alone_ = model.generate(input_ids=ids[row : row + 1], adapter_names=[name], **options)
        assert torch.equal(mixed[row : row + 1], alone_)
    held = {id(t) for name in names for t in adapter_tensors(model.get_base_model(), name)}
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    kept = {id(t) for group in layer.plan.groups for adapter in group.adapters for t in adapter.parameters()}
    assert kept <= held and model.base_model.selection.current().stacks is None


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_clone_made_after_a_mixed_batch_is_equal_and_independent(clone):
    model, x = sixteen(), torch.randn(16, 5, 12)
    expected = model(x, adapter_names=NAMES)
    made = clone(model)
    with torch.no_grad():
        for name in NAMES:
            for tensor in adapter_tensors(model.get_base_model(), name):
                tensor.zero_()
    assert torch.equal(made(x, adapter_names=NAMES), expected)
    assert not torch.allclose(model(x, adapter_names=NAMES), expected)


def test_an_adapter_with_a_hook_runs_where_the_hook_sees_it():
    model, x, seen = sixteen(), torch.randn(16, 5, 12), []
    hooked = model.get_base_model().layer.adapters["a5"]
    hooked.register_forward_hook(lambda module, args, output: seen.append(output))
    mixed = model(x, adapter_names=NAMES)
    assert len(seen) == 1 and torch.equal(seen[0][0], mixed[5])


def test_what_is_kept_of_fixed_adapters_is_that_of_the_last_batch():
    model, x = sixteen(), torch.randn(16, 5, 12)
    with torch.no_grad():
        expected = {order: model(x, adapter_names=NAMES[::order]) for order in (1, -1)}
        with model.fixed_adapters():
            stacks = model.base_model.selection.current().stacks
            assert len(stacks) == 0
            for order in (1, -1, 1, 1):
                assert torch.equal(model(x, adapter_names=NAMES[::order]), expected[order])
                kept = dict(stacks)
                assert torch.equal(model(x, adapter_names=NAMES[::order]), expected[order])
                assert dict(stacks) == kept and len(kept) == 5  # four ranks, one of them with and without bias
                del kept
    assert model.base_model.selection.current().stacks is None


def test_an_adapter_that_was_deleted_is_not_kept_by_the_last_batch():
    model = sixteen()
    model(torch.randn(16, 12), adapter_names=NAMES)
    layer = model.get_base_model().layer
    assert "a3" in layer.plan.held
    model.delete_adapter("a3")
    assert layer.plan is None
