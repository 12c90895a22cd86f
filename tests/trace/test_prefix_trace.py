"""What a trace says of prefix tuning, compared with the model's own numbers."""

import pytest
import torch
from torch.nn import functional

from deltatune import LoraConfig, PrefixTuningConfig, get_peft_model
from deltatune.trace import example, trace

P = 6


def attention_lengths(report, prefixed):
    return {
        (call.kind, call.length_before, call.length_after) for call in report.calls if bool(call.prefix) == prefixed
    }


@pytest.mark.parametrize("architecture, tokens", [("t5", 5), ("gpt2", 7), ("bert", 7)])
def test_every_site_gets_p_more_keys(architecture, tokens):
    model, batch = example("prefix_tuning", architecture, num_virtual_tokens=P)
    report = trace(model, batch)
    sites = [site.name for site in model.prefixes["default"].sites]
    with_prefix = [call for call in report.calls if call.prefix]
    assert [call.module for call in with_prefix] == sites and len(sites) == 4
    for call in with_prefix:
        assert (call.length_before, call.length_after, call.prefix) == (tokens, tokens + P, P)
        assert call.value_after == call.key_after and call.backend == "sdpa"
        assert call.mask_after[-1] == tokens + P


def test_the_encoder_and_cross_attention_of_t5_are_listed_without_a_prefix():
    model, batch = example("prefix_tuning", "t5", num_virtual_tokens=P)
    report = trace(model, batch)
    assert len(report.calls) == 12
    assert attention_lengths(report, prefixed=True) == {("self", 5, 5 + P)}
    assert attention_lengths(report, prefixed=False) == {("encoder", 7, 7), ("cross", 7, 7)}


def test_all_sites_of_t5_on_request():
    model, batch = example("prefix_tuning", "t5", num_virtual_tokens=P, sites="all")
    report = trace(model, batch)
    assert attention_lengths(report, True) == {("encoder", 7, 7 + P), ("self", 5, 5 + P), ("cross", 7, 7 + P)}
    assert not attention_lengths(report, False) and not report.dead


def test_calls_are_those_that_reach_the_kernel(monkeypatch):
    model, batch = example("prefix_tuning", "gpt2", num_virtual_tokens=P)
    report = trace(model, batch)
    kernel, seen = functional.scaled_dot_product_attention, []

    def spied(query, key, value, attn_mask=None, **more):
        seen.append([list(query.shape), list(key.shape), list(value.shape), list(attn_mask.shape)])
        return kernel(query, key, value, attn_mask=attn_mask, **more)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spied)
    model(**batch)
    assert [[call.query, call.key_after, call.value_after, call.mask_after] for call in report.calls] == seen


@pytest.mark.parametrize("architecture", ["t5", "gpt2", "bert"])
def test_gradients_are_those_of_a_plain_backward(architecture):
    model, batch = example("prefix_tuning", architecture, num_virtual_tokens=P)
    report = trace(model, batch)
    output = model(**batch)
    output.loss.backward()
    grad = model.prefixes["default"].encoder.embedding.weight.grad
    assert report.loss.value == pytest.approx(output.loss.item())
    start = 0
    for part, site in zip(report.prefixes[0].parts, model.prefixes["default"].sites):
        heads, dim, value_heads, value_dim = site.shape
        middle, end = start + heads * dim, start + heads * dim + value_heads * value_dim
        assert part.site == site.name and part.readers == [site.name] and part.columns == [start, end]
        assert part.key_shape == [heads, P, dim] and part.value_shape == [value_heads, P, value_dim]
        assert part.key.norm == pytest.approx(grad[:, start:middle].norm().item(), rel=1e-5)
        assert part.value.norm == pytest.approx(grad[:, middle:end].norm().item(), rel=1e-5)
        start = end
    assert start == grad.shape[1]
    every = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert report.gradient.norm == pytest.approx(every.norm().item(), rel=1e-5)
    assert report.gradient.elements == every.numel() == model.get_nb_trainable_parameters()[0]


def test_with_projection_the_gradient_of_each_site_is_that_of_the_rows():
    model, batch = example(
        "prefix_tuning", "gpt2", num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=24
    )
    report = trace(model, batch)
    prefix, rows = report.prefixes[0], []
    encoder = model.prefixes["default"].encoder
    handle = encoder.register_forward_hook(lambda module, args, output: rows.append(output) or output.retain_grad())
    model(**batch).loss.backward()
    handle.remove()
    for part in prefix.parts:
        a, b = part.columns
        measured = (part.key.norm**2 + part.value.norm**2) ** 0.5
        assert measured == pytest.approx(rows[0].grad[:, a:b].norm().item(), rel=1e-5)
    for parameter, (name, own) in zip(prefix.parameters, encoder.named_parameters()):
        assert parameter.name == name and parameter.gradient.norm == pytest.approx(own.grad.norm().item(), rel=1e-5)
    steps = [
        ("virtual tokens", [P]),
        ("embedding", [P, 32]),
        ("Linear", [P, 24]),
        ("Tanh", [P, 24]),
        ("Linear", [P, 256]),
    ]
    assert prefix.projection and prefix.steps == steps


def test_half_of_the_prefix_is_dead_in_peft_layout_on_t5():
    model, batch = example("prefix_tuning", "t5", num_virtual_tokens=P, layout="peft")
    report = trace(model, batch)
    parts = report.prefixes[0].parts
    assert [part.dead for part in parts] == [False, True, False, True]
    names = [site.name for site in model.prefixes["default"].sites]
    assert [part.readers for part in parts] == [[names[0], names[2]], [], [names[1], names[3]], []]
    assert all(part.key.reason == "no attention reads it" for part in parts if part.dead)
    assert report.dead == [f"default: {names[1]}", f"default: {names[3]}"]
    model(**batch).loss.backward()
    grad = model.prefixes["default"].encoder.embedding.weight.grad
    assert report.gradient.dead == (grad == 0).sum().item() == grad.numel() // 2
    assert report.gradient.live == grad.numel() // 2
    assert report.prefixes[0].shift == P


def test_nothing_is_dead_in_native_layout_on_t5():
    report = trace(*example("prefix_tuning", "t5"))
    assert not report.dead and report.gradient.dead == 0 and report.prefixes[0].shift == 0


def test_peft_layout_with_an_odd_number_of_layers_is_a_permutation():
    from transformers import T5Config, T5ForConditionalGeneration

    _, batch = example()
    config = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=3, num_heads=2, decoder_start_token_id=0)
    wrapped = get_peft_model(
        T5ForConditionalGeneration(config),
        PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, layout="peft"),
    )
    report = trace(wrapped.eval(), batch)
    readers = [reader.split(".")[2] for part in report.prefixes[0].parts for reader in part.readers]
    assert readers == ["0", "2", "1"] and not report.dead


def test_a_site_that_the_batch_does_not_reach_is_dead():
    model, batch = example("prefix_tuning", "t5", sites="all")
    with torch.no_grad():
        states = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    batch = {"encoder_outputs": states, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
    report = trace(model, batch)
    dead = [part for part in report.prefixes[0].parts if part.dead]
    assert [part.kind for part in dead] == ["encoder"] * 4
    assert {part.key.reason for part in dead} == {"its attention was not called"}


def test_gradient_checkpointing_changes_nothing():
    model, batch = example("prefix_tuning", "gpt2")
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = trace(model, batch)
    model.gradient_checkpointing_enable()
    checkpointed = trace(model, {**batch, "use_cache": False})
    assert [call.module for call in checkpointed.calls] == [call.module for call in plain.calls]
    for a, b in zip(checkpointed.prefixes[0].parts, plain.prefixes[0].parts):
        assert a.key.norm == pytest.approx(b.key.norm, rel=1e-4) and a.value.norm == pytest.approx(
            b.value.norm, rel=1e-4
        )


def test_prefix_and_lora_together():
    model, batch = example("prefix_tuning", "t5", num_virtual_tokens=P)
    model.add_adapter("low_rank", LoraConfig(task_type="SEQ_2_SEQ_LM", r=4))
    model.set_adapter(["default", "low_rank"])
    report = trace(model, batch)
    assert report.active == ["default", "low_rank"] and not report.dead
    assert len(report.prefixes[0].parts) == 4 and len(report.layers) == 24
    assert [stop.name for stop in report.stops] == [
        *("config", "config", "registry", "registry", "task class", "prefix encoder", "keys and values", "attention"),
        *("wrapped layers", "loss", "gradient"),
    ]


def test_a_frozen_prefix_is_told_from_a_dead_one():
    model, batch = example("prefix_tuning", "gpt2")
    model.set_adapter("default", inference_mode=True)
    report = trace(model, batch)
    assert {part.key.state for part in report.prefixes[0].parts} == {"frozen"} and not report.dead
    assert report.gradient.norm is None and "is_trainable=True" in report.gradient.note


def test_without_labels_there_are_shapes_and_no_gradients():
    model, batch = example("prefix_tuning", "gpt2", num_virtual_tokens=P)
    del batch["labels"]
    report = trace(model, batch)
    assert report.loss.value is None and report.gradient.norm is None and not report.dead
    assert {part.value.state for part in report.prefixes[0].parts} == {"unknown"}
    assert report.calls[0].length_after == 7 + P
    by_hand = trace(model, batch, loss=lambda output: output.logits.square().mean())
    assert by_hand.loss.value > 0 and by_hand.gradient.live == by_hand.gradient.elements
