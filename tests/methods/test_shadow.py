"""ShadowPEFT against its four equations, and as a model of its own."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import StaticCache

import deltatune
from deltatune import PeftModel, ShadowConfig, get_peft_model
from deltatune.errors import ConfigError, MergeError, StateError, TargetError
from tests.core.tiny import batch, logits, tiny


def shadowed(arch: str = "llama", moved: bool = True, **options):
    torch.manual_seed(0)
    model = get_peft_model(tiny(arch), ShadowConfig(task_type="CAUSAL_LM", **{"r": 3, **options})).eval()
    if moved:
        with torch.no_grad():
            for parameter in model.prompt_encoder["default"].parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model, model.prompt_encoder["default"]


def by_hand(model, network, x):
    """The decoder's loop written out once more, with the shadow beside it."""
    llama = model.get_base_model().model
    for handle in vars(llama)["_deltatune_shadow"].handles:
        handle.remove()
    embedded = llama.embed_tokens(x["input_ids"])
    rope = llama.rotary_emb(embedded, torch.arange(embedded.shape[1])[None])
    blocked = torch.full((7, 7), float("-inf")).triu(1) + torch.zeros(2, 1, 7, 7)
    blocked = blocked.masked_fill(x["attention_mask"][:, None, None, :] == 0, float("-inf"))
    s = network.shadow_backbone(inputs_embeds=embedded, attention_mask=x["attention_mask"]).last_hidden_state
    h = embedded
    for number, block in enumerate(llama.layers):
        c = network.crossings[str(number)]
        h = h + 0.1 * (h - s) @ c.shadow_down.weight.T @ c.shadow_up.weight.T
        h = block(h, attention_mask=blocked, position_embeddings=rope)
        if c.shadow_update_gate is not None:
            g = torch.sigmoid(_mlp(c.shadow_update_gate, h))
            s = (1 - g) * s + g * _mlp(c.shadow_update_transform, h)
    return model.get_base_model().lm_head(llama.norm(h))


def _mlp(layers, x):
    inner = torch.nn.functional.gelu(x @ layers[0].weight.T + layers[0].bias)
    return inner @ layers[2].weight.T + layers[2].bias


def test_a_pass_is_the_four_equations():
    model, network = shadowed()
    x = batch("llama")
    found = logits(model, x)
    expected = by_hand(model, network, x)
    seen = x["attention_mask"].bool()
    assert_close(found[seen], expected[seen], rtol=1e-4, atol=1e-4)


def test_what_is_trained_has_no_dead_part():
    _, network = shadowed(r=2)
    width, layers = 16, 3
    crossing = 2 * width * 2
    update = 2 * (width * 2 + 2 + 2 * width + width)
    backbone = sum(p.numel() for p in tiny("llama").model.layers[0].parameters()) + width
    assert sum(p.numel() for p in network.parameters()) == layers * crossing + (layers - 1) * update + backbone
    assert not any("embed" in name for name, _ in network.named_parameters())


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_it_generates_as_without_a_cache(arch):
    model, _ = shadowed(arch)
    ids = batch(arch)["input_ids"]
    settings = {"max_new_tokens": 6, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    plain = model.generate(input_ids=ids, use_cache=False, **settings)
    assert torch.equal(model.generate(input_ids=ids, **settings), plain)
    assert torch.equal(model.generate(input_ids=ids, cache_implementation="static", **settings), plain)
    beams = [model.generate(input_ids=ids, num_beams=3, use_cache=use, **settings) for use in (True, False)]
    assert torch.equal(*beams)
    assert not torch.equal(plain, tiny(arch).generate(input_ids=ids, **settings))


def test_a_cache_that_the_shadow_has_not_seen_is_refused():
    model, _ = shadowed()
    ids = batch("llama")["input_ids"]
    with torch.no_grad(), model.disable_adapter():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with torch.no_grad(), pytest.raises(StateError, match="has not seen"):
        model(input_ids=ids[:, :1], past_key_values=cache)


def test_a_static_cache_of_the_callers_is_filled_for_both():
    model, _ = shadowed()
    ids = batch("llama")["input_ids"]
    cache = StaticCache(config=model.get_base_model().config, max_cache_len=12)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        model(input_ids=ids[:, :4], past_key_values=cache)
        rest = model(input_ids=ids[:, 4:], past_key_values=cache).logits
    assert_close(rest, whole[:, 4:], rtol=1e-4, atol=1e-5)


def test_rows_may_have_different_shadows():
    model, _ = shadowed()
    model.add_adapter("other", ShadowConfig(task_type="CAUSAL_LM", r=2, init_weights=False))
    x = {key: value.repeat(2, 1)[:3] for key, value in batch("llama").items() if key != "labels"}
    with torch.no_grad():
        mixed = model(**x, adapter_names=["other", "__base__", "default"]).logits
        for row, name in enumerate(("other", None, "default")):
            one = {key: value[row : row + 1] for key, value in x.items()}
            if name is None:
                with model.disable_adapter():
                    alone = model(**one).logits
            else:
                model.set_adapter(name)
                alone = model(**one).logits
            assert_close(mixed[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(share):
    model, network = shadowed(shadow_dropout=0.0, share_embeddings=share)
    x, found = batch("llama"), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.train()
        model(**x).loss.backward()
        found.append([p.grad.clone() for p in network.parameters()])
        model.zero_grad()
    for plain, again in zip(*found):
        assert_close(again, plain)


def test_only_neighbouring_blocks_are_taken():
    model, network = shadowed(target_modules=["0", "1"])
    assert list(network.crossings) == ["0", "1"]
    assert model.peft_config["default"].target_modules == {"model.layers.0", "model.layers.1"}
    base = tiny("llama")
    with pytest.raises(TargetError, match="neighbours"):
        get_peft_model(base, ShadowConfig(task_type="CAUSAL_LM", target_modules=["0", "2"]))
    with pytest.raises(TargetError, match="names none"):
        get_peft_model(base, ShadowConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert not vars(base.model)["_forward_pre_hooks"] and not any(b._forward_hooks for b in base.model.layers)


def test_sizes_that_make_no_model_are_refused():
    with pytest.raises(ConfigError, match="mirror"):
        ShadowConfig(shadow_model="some/model", shadow_hidden_size=8)
    with pytest.raises(TargetError, match="decoder-only"):
        get_peft_model(tiny("t5"), ShadowConfig(task_type="SEQ_2_SEQ_LM"))


def test_it_cannot_be_merged_and_says_why():
    model, _ = shadowed()
    with pytest.raises(MergeError, match="second transformer"):
        model.merge_and_unload()


@pytest.mark.parametrize("options", [{}, {"shadow_hidden_size": 8, "shadow_num_attention_heads": 2}], ids=str)
def test_the_shadow_is_a_model_of_its_own(options, tmp_path):
    model, network = shadowed(**options)
    alone = deltatune.detached_shadow(model)
    x = batch("llama")
    x.pop("labels")
    base = model.get_base_model()
    inputs = {"input_ids": x["input_ids"]} if options else {"inputs_embeds": base.model.embed_tokens(x["input_ids"])}
    s = network(**inputs, attention_mask=x["attention_mask"])
    assert_close(logits(alone, x), base.lm_head(s), rtol=1e-4, atol=1e-5)
    assert not {id(p) for p in alone.parameters()} & {id(p) for p in model.parameters()}
    alone.save_pretrained(tmp_path)
    assert_close(logits(type(alone).from_pretrained(tmp_path), x), logits(alone, x))


def test_a_copy_and_a_reloaded_one_have_a_way_of_their_own(tmp_path):
    model, _ = shadowed()
    x = batch("llama")
    expected = logits(model, x)
    twin = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    model.unload()
    assert torch.equal(logits(twin, x), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path), x), expected)
