"""(IA)^3 against arXiv 2205.05638, section 3.3: l * (W x) in attention, W (l * x) in the feed-forward layers."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import IA3Config, get_peft_model


def adapted(layer: nn.Module, **options):
    torch.manual_seed(0)
    model = get_peft_model(nn.ModuleDict({"layer": layer}).double(), IA3Config(target_modules=["layer"], **options))
    wrapper = model.get_base_model()["layer"]
    ia3 = wrapper.adapters["default"]
    start = ia3.ia3_l.detach().clone()
    nn.init.normal_(ia3.ia3_l)
    return wrapper, ia3, start


def test_outputs_are_scaled_one_by_one_bias_included():
    wrapper, ia3, start = adapted(nn.Linear(6, 4))
    assert ia3.ia3_l.shape == (4, 1) and torch.equal(start, torch.ones_like(start))
    x = torch.randn(5, 6, dtype=torch.float64)
    W, b = wrapper.base_layer.weight, wrapper.base_layer.bias
    assert_close(wrapper(x), torch.stack([ia3.l * (W @ row + b) for row in x]))


def test_in_feed_forward_layers_the_inputs_are_scaled():
    wrapper, ia3, _ = adapted(nn.Linear(6, 4), feedforward_modules=["layer"])
    assert ia3.ia3_l.shape == (1, 6) and ia3.is_feedforward
    x = torch.randn(5, 6, dtype=torch.float64)
    W, b = wrapper.base_layer.weight, wrapper.base_layer.bias
    assert_close(wrapper(x), torch.stack([W @ (ia3.l * row) + b for row in x]))


@pytest.mark.parametrize("on_input", [False, True])
def test_a_convolution_is_scaled_by_channel(on_input):
    options = {"feedforward_modules": ["layer"]} if on_input else {}
    wrapper, ia3, _ = adapted(nn.Conv2d(3, 4, 2, padding=1), **options)
    assert ia3.ia3_l.shape == ((1, 3, 1, 1) if on_input else (1, 4, 1, 1))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    layer = wrapper.base_layer
    assert_close(wrapper(x), layer(x * ia3.ia3_l) if on_input else layer(x) * ia3.ia3_l)


def test_merging_scales_the_rows_or_the_columns_and_only_the_former_scales_the_bias():
    wrapper, ia3, _ = adapted(nn.Linear(6, 4))
    merged = wrapper.merged_parameters(["default"], check=True)
    assert_close(merged.weight.data, torch.diag(ia3.l.detach()) @ wrapper.base_layer.weight)
    assert_close(merged.bias.data, (ia3.l * wrapper.base_layer.bias).detach())
    wrapper, ia3, _ = adapted(nn.Linear(6, 4), feedforward_modules=["layer"])
    merged = wrapper.merged_parameters(["default"], check=True)
    assert_close(merged.weight.data, wrapper.base_layer.weight @ torch.diag(ia3.l.detach()))
    assert torch.equal(merged.bias, wrapper.base_layer.bias)


def test_a_random_start_is_standard_normal():
    _, _, start = adapted(nn.Linear(2, 4000), init_ia3_weights=False)
    assert start.std().item() == pytest.approx(1, rel=0.05) and abs(start.mean()) < 0.1


def test_usual_targets_of_t5_scale_keys_values_and_the_inner_feed_forward_activations():
    from tests.core.tiny import tiny

    model = get_peft_model(tiny("t5"), IA3Config())
    layers = model.base_model.targeted_module_names
    assert {path.rpartition(".")[2] for path in layers} == {"k", "v", "wo"}
    config, count = model.get_base_model().config, model.get_nb_trainable_parameters()[0]
    inner = config.num_heads * config.d_kv
    assert count == 2 * (2 * inner + config.d_ff) + 2 * (4 * inner + config.d_ff)  # encoder, then decoder with cross


def test_layers_can_be_chosen_by_number_and_peft_is_told_their_names(tmp_path):
    import json

    from tests.core.tiny import tiny

    model = get_peft_model(
        tiny("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[], layers_to_transform=[1])
    )
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["model.layers.1.self_attn.k_proj"] and "layers_to_transform" not in saved


def test_a_feed_forward_convolutions_vector_counts_for_every_position_of_the_kernel():
    wrapper, ia3, _ = adapted(nn.Conv2d(3, 4, 2), feedforward_modules=["layer"])
    expected = wrapper.base_layer.weight * ia3.ia3_l.view(1, 3, 1, 1)
    assert_close(wrapper.stored_weight(["default"]), expected)
