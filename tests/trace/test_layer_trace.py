"""What a trace says of layer methods, compared with direct computation."""

import pytest
import torch
from torch import nn

from deltatune import METHODS, LoraConfig, get_peft_model
from deltatune.errors import StateError
from deltatune.inject import adapted_layers
from deltatune.trace import example, trace
from tests.laws.examples import small

LAYER_METHODS = sorted(method.peft_type.value for method in METHODS.values() if method.adapter is not None)


def off_init(model):
    """Adapters moved off their start; and biases of the base, which a fresh model has at zero."""
    generator = torch.Generator().manual_seed(3)
    for _, layer in adapted_layers(model.get_base_model()):
        if isinstance(bias := getattr(layer.base_layer, "bias", None), torch.Tensor):
            bias.data.add_(0.1 * torch.randn(bias.shape, generator=generator))
        for parameter in (p for adapter in layer.adapters.values() for p in adapter.everything()):
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_the_formula_is_the_methods_and_no_sentence_about_its_options():
    model, batch = example("lora", "t5")
    assert trace(model, batch).methods[0].formula.startswith("LoRA: W' = W + (alpha / r) B A")


def test_every_wrapped_layer_of_lora_with_rank_scaling_and_norms():
    model, batch = example("lora", "t5", r=4, lora_alpha=12, rank_pattern={"v": 2})
    off_init(model)
    report = trace(model, batch)
    layers = dict(adapted_layers(model.get_base_model()))
    assert [stop.path for stop in report.layers] == list(layers) and len(layers) == 24
    model(**batch).loss.backward()
    for stop in report.layers:
        layer, part = layers[stop.path], stop.adapters[0]
        lora = layer.adapters["default"]
        rank = 2 if stop.path.endswith("v") else 4
        assert (part.rank, part.scaling) == (rank, 12 / rank)
        delta = part.scaling * lora.lora_B.weight.detach().double() @ lora.lora_A.weight.detach().double()
        assert part.delta_norm == pytest.approx(delta.norm().item(), rel=1e-6)
        assert part.base_norm == pytest.approx(layer.base_layer.weight.detach().double().norm().item(), rel=1e-6)
        assert stop.weight == list(layer.base_layer.weight.shape) and stop.calls == 1
        for parameter, (name, own) in zip(part.parameters, lora.named_parameters()):
            assert parameter.name == name and parameter.shape == list(own.shape)
            assert parameter.gradient.norm == pytest.approx(own.grad.norm().item(), rel=1e-5)
            assert parameter.gradient.state == "live"
    tokens = {stop.path: stop.input_shape[1] for stop in report.layers}
    assert tokens["encoder.block.0.layer.0.SelfAttention.q"] == 7
    assert tokens["decoder.block.0.layer.0.SelfAttention.q"] == 5
    assert tokens["decoder.block.0.layer.1.EncDecAttention.v"] == 7
    assert report.gradient.waiting == 0 and not report.calls


def test_before_the_first_step_a_waits_for_b():
    model, batch = example("lora", "gpt2")
    report = trace(model, batch)
    for stop in report.layers:
        a, b = stop.adapters[0].parameters
        assert (a.name, a.gradient.state, b.gradient.state) == ("lora_A.weight", "waiting", "live")
        assert "lora_B.weight" in a.gradient.reason and stop.adapters[0].delta_norm == 0
    assert not report.dead and report.gradient.waiting == sum(s.adapters[0].parameters[0].size for s in report.layers)


@pytest.mark.parametrize("method", LAYER_METHODS)
def test_the_change_of_any_method_is_its_adapted_weight_minus_the_base(method):
    model, batch = example(method, "gpt2", **small(method.lower()))
    off_init(model)
    report = trace(model, batch)
    layers = dict(adapted_layers(model.get_base_model()))
    assert [stop.path for stop in report.layers] == list(layers) and layers
    for stop in report.layers:
        layer = layers[stop.path]
        if layer.adapters["default"].mergeable is not True:
            assert stop.adapters[0].delta_norm is None
            continue
        change = (layer.stored_weight(["default"]) - layer.base_layer.weight).norm().item()
        assert stop.adapters[0].delta_norm == pytest.approx(change, rel=1e-3)
        before, after = layer.as_map().bias, layer.as_map(["default"]).bias
        assert stop.adapters[0].delta_norm > 0 or not torch.equal(before, after), "weight or bias"
    assert report.methods[0].method == method and not report.dead


def test_stacked_adapters_are_told_apart():
    model, batch = example("lora", "gpt2", r=2)
    model.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", r=4))
    model.set_adapter(["default", "second"])
    off_init(model)
    report = trace(model, batch)
    first, second = report.layers[0].adapters
    assert (first.adapter, first.rank, second.adapter, second.rank) == ("default", 2, "second", 4)
    layer = dict(adapted_layers(model.get_base_model()))[report.layers[0].path]
    below = layer.as_map(["default"]).weight.norm().item()
    assert second.base_norm == pytest.approx(below, rel=1e-5) and second.base_norm != first.base_norm


class Branches(nn.Module):
    """Three layers: one that the loss needs, one that it ignores, one that is never called."""

    def __init__(self):
        super().__init__()
        self.used, self.ignored, self.unused = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(5, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        self.ignored(x)
        return self.norm(self.used(x)).square().mean()


def test_layers_that_get_nothing_are_dead_with_the_reason():
    torch.manual_seed(0)
    model = get_peft_model(Branches(), LoraConfig(target_modules=["used", "ignored", "unused"], r=2))
    off_init(model)
    report = trace(model, {"x": torch.randn(3, 5)})
    dead = {
        stop.path: stop.adapters[0].parameters[0].gradient.reason for stop in report.layers if stop.adapters[0].dead
    }
    assert dead == {"ignored": "the loss does not depend on it", "unused": "its layer was not called"}
    assert report.dead == ["default: ignored", "default: unused"]
    shapes = {stop.path: (stop.calls, stop.input_shape, stop.output_shape) for stop in report.layers}
    assert shapes["used"] == (1, [3, 5], [3, 4]) and shapes["unused"] == (0, None, None)
    assert report.gradient.dead == 2 * (2 * 5 + 4 * 2) and report.gradient.live == 2 * 5 + 4 * 2


def test_a_trained_head_is_listed():
    model, batch = example("lora", "bert")
    report = trace(model, batch)
    assert [(kept.path, [p.shape for p in kept.parameters]) for kept in report.copies] == [
        ("classifier", [[2, 32], [2]])
    ]
    model(**batch).loss.backward()
    head = model.get_base_model().classifier.modules_to_save["default"]
    assert report.copies[0].parameters[0].gradient.norm == pytest.approx(head.weight.grad.norm().item(), rel=1e-5)
    assert report.gradient.live + report.gradient.waiting == report.gradient.elements


def test_what_was_unfrozen_by_hand_is_listed():
    model, batch = example("lora", "gpt2")
    norm = model.get_base_model().transformer.ln_f.weight
    norm.requires_grad_(True)
    report = trace(model, batch)
    assert [p.name for p in report.gradient.others] == ["base_model.model.transformer.ln_f.weight"]
    assert report.gradient.others[0].gradient.state == "live"


def test_a_loss_that_depends_on_nothing_that_trains_leaves_everything_dead():
    model, batch = example("lora", "gpt2")
    report = trace(model, batch, loss=lambda output: output.loss.detach())
    assert report.gradient.live == 0 and report.gradient.dead == report.gradient.elements
    assert len(report.dead) == len(report.layers) and all(stop.adapters[0].dead for stop in report.layers)


def test_reentrant_checkpointing_is_refused_instead_of_shown_as_dead():
    model, batch = example("lora", "gpt2")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(StateError, match="'use_reentrant': False"):
        trace(model, {**batch, "use_cache": False})
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert not trace(model, {**batch, "use_cache": False}).dead
