"""Prefixes beside other adapters and beside each other: what is active acts, and nothing else."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from deltatune import HRAConfig, IA3Config, LoraConfig, OFTConfig, PeftModel, PrefixTuningConfig, get_peft_model
from deltatune.inject import adapter_parameters
from deltatune.prompts import attention
from deltatune.prompts.handed import KeysValues
from tests.prompts.models import KINDS, bare, batch, prefixed, redraw

LAYERS = {"gpt2": ["c_attn"], "llama": ["q_proj", "down_proj"], "t5": ["q", "v"], "bart": ["q_proj", "v_proj"]}
OTHERS = {
    "lora": lambda **facts: LoraConfig(r=2, **facts),
    "ia3": lambda **facts: IA3Config(feedforward_modules=[], **facts),
    "oft": lambda **facts: OFTConfig(r=0, oft_block_size=4, **facts),
    "hra": lambda **facts: HRAConfig(r=2, **facts),
}


def other(name: str, method: str) -> Any:
    return OTHERS[method](task_type=KINDS[name][1], target_modules=LAYERS[name])


def move(model: PeftModel, adapter: str, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model.get_base_model(), adapter):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def both(name: str, method: str) -> PeftModel:
    model = prefixed(name)
    model.add_adapter("layers", other(name, method))
    move(model, "layers")
    model.set_adapter(["default", "layers"])
    return model


@torch.no_grad()
def logits(model: Any, name: str) -> Tensor:
    return model.eval()(**batch(name)).logits


# ----------------------------------------------------------------------------------------------- beside other methods


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("name", LAYERS)
def test_each_of_the_two_can_be_switched_off_and_both_come_back_from_files(name, method, tmp_path):
    model = both(name, method)
    together = logits(model, name)
    alone = get_peft_model(bare(name), other(name, method), "layers")
    move(alone, "layers")
    model.set_adapter("layers")
    assert torch.equal(logits(model, name), logits(alone, name))
    model.set_adapter("default")
    assert torch.equal(logits(model, name), logits(prefixed(name), name))
    model.set_adapter(["layers", "default"])
    assert torch.equal(logits(model, name), together)
    with model.disable_adapter():
        assert torch.equal(logits(model, name), logits(bare(name), name))

    model.save_pretrained(tmp_path)
    prompt_first = PeftModel.from_pretrained(bare(name), tmp_path)
    prompt_first.load_adapter(tmp_path / "layers", "layers")
    layers_first = PeftModel.from_pretrained(bare(name), tmp_path / "layers", "layers")
    layers_first.load_adapter(tmp_path, "default")
    for loaded in (prompt_first, layers_first):
        loaded.set_adapter(["default", "layers"])
        assert torch.equal(logits(loaded, name), together)


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_both_train_and_nothing_else(name, method):
    model = both(name, method).train()
    before = {path: p.detach().clone() for path, p in model.named_parameters()}
    model(**batch(name)).logits.square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
    changed = {path for path, p in model.named_parameters() if not torch.equal(p, before[path])}
    assert changed == {path for path, p in model.named_parameters() if p.requires_grad}
    assert len({"prompt_encoder" in path for path in changed}) == 2


@pytest.mark.parametrize("method", OTHERS)
def test_layers_merge_below_a_prefix_and_the_merged_model_is_plain(method):
    model = both("llama", method)
    together = logits(model, "llama")
    model.merge_adapter(["layers"])
    torch.testing.assert_close(logits(model, "llama"), together, atol=1e-4, rtol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model, "llama"), together)

    plain = model.merge_and_unload(adapter_names=["layers"])
    alone = get_peft_model(bare("llama"), other("llama", method), "layers")
    move(alone, "layers")
    assert torch.equal(logits(plain, "llama"), logits(alone.merge_and_unload(), "llama"))
    assert not any(attention.SLOT in vars(module) or module._forward_hooks for module in plain.modules())


# ----------------------------------------------------------------------------------------------- beside other prefixes


class Handed:
    """Stands in for the stage: hands over what a test joined by hand."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.pair = tuple(torch.cat(parts, dim=1) for parts in zip(*pairs))

    def prefix_of(self, site: str, batch: int) -> KeysValues:
        return KeysValues(*self.pair)

    def past(self, site: str) -> None:
        return None


@pytest.mark.parametrize("order", [["default", "b", "c"], ["c", "default", "b"], ["b", "c"]])
@pytest.mark.parametrize("name", ["llama", "latent", "t5", "bart"])
def test_prefixes_of_other_lengths_and_sites_are_joined_at_each_site(name, order):
    """One projected, on self-attention; one on cross-attention; one, of another length, everywhere."""
    is_seq2seq = KINDS[name][1] == "SEQ_2_SEQ_LM"
    model = prefixed(name, sites="self", prefix_projection=True)
    for adapter, count, sites in (("b", 2, "cross" if is_seq2seq else "all"), ("c", 5, "all")):
        model.add_adapter(adapter, PrefixTuningConfig(task_type=KINDS[name][1], num_virtual_tokens=count, sites=sites))
    redraw(model, seed=7)
    model.set_adapter(order)

    joined: dict[str, list] = {}
    for adapter in order:
        encoder, config = model.prompt_encoder[adapter], model.peft_config[adapter]
        parts = encoder().split([size for h, d, hv, dv in config.site_shapes for size in (h * d, hv * dv)], dim=1)
        for index, (site, (heads, _, value_heads, _)) in enumerate(zip(config.site_names, config.site_shapes)):
            keys = parts[2 * index].unflatten(1, (heads, -1)).transpose(0, 1)  # (heads, P, dim)
            values = parts[2 * index + 1].unflatten(1, (value_heads, -1)).transpose(0, 1)
            joined.setdefault(site, []).append((keys, values))
    by_hand = bare(name)
    for site, pairs in joined.items():
        vars(by_hand.get_submodule(site))[attention.SLOT] = attention.Slot(Handed(pairs), site)  # type: ignore
    torch.testing.assert_close(logits(model, name), logits(by_hand, name), atol=1e-6, rtol=1e-6)

    model.train()(**batch(name)).logits.square().mean().backward()
    for adapter in model.prompt_encoder:
        gradients = [p.grad for p in model.prompt_encoder[adapter].parameters()]
        assert all((g is not None and (g != 0).any()) == (adapter in order) for g in gradients)


# --------------------------------------------------------------------------------------- sequences of adding and taking


def prefix(count: int, **settings: Any) -> PrefixTuningConfig:
    return PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=count, **settings)  # type: ignore[arg-type]


ADAPTERS: dict[str, Any] = {
    "one": lambda: prefix(2),
    "two": lambda: prefix(3, sites="all", prefix_projection=True),
    "cross": lambda: prefix(1, sites="cross"),
    "layers": lambda: other("t5", "lora"),
}


def fill(model: PeftModel, adapter: str) -> None:
    """Contents that depend on nothing but the adapter's name."""
    seed = list(ADAPTERS).index(adapter)
    generator = torch.Generator().manual_seed(seed)
    if adapter in model.prompt_encoder:
        with torch.no_grad():
            for parameter in model.prompt_encoder[adapter].parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
    else:
        move(model, adapter, seed)


@cache
def expected(active: tuple[str, ...]) -> Tensor:
    """A fresh model that never had another adapter."""
    if not active:
        return logits(bare("t5"), "t5")
    model = get_peft_model(bare("t5"), ADAPTERS[active[0]](), active[0])
    for adapter in active[1:]:
        model.add_adapter(adapter, ADAPTERS[adapter]())
    for adapter in active:
        fill(model, adapter)
    model.set_adapter(list(active))
    return logits(model, "t5")


@pytest.mark.parametrize("seed", range(4))
def test_after_any_sequence_the_model_is_one_that_only_ever_had_what_is_active(seed):
    choose = random.Random(seed)
    model = get_peft_model(bare("t5"), ADAPTERS["one"](), "one")
    fill(model, "one")
    there, active = ["one"], ["one"]
    for _ in range(12):
        step = choose.choice(["add", "delete", "set", "set", "disable"])
        absent = [name for name in ADAPTERS if name not in there]
        if step == "add" and absent:
            name = choose.choice(absent)
            model.add_adapter(name, ADAPTERS[name]())
            fill(model, name)
            there.append(name)
        elif step == "delete" and len(there) > 1 and len(active) < len(there):
            name = choose.choice([name for name in there if name not in active])
            model.delete_adapter(name)
            there.remove(name)
        elif step == "set":
            active = choose.sample(there, choose.randint(1, len(there)))
            model.set_adapter(active)
        elif step == "disable":
            with model.disable_adapter():
                assert torch.equal(logits(model, "t5"), expected(()))
        assert torch.equal(logits(model, "t5"), expected(tuple(active)))
        trained = {name for name in there if any(p.requires_grad for p in parameters_of(model, name))}
        assert trained == set(active) and list(model.peft_config) == there
    plain = model.unload()
    assert torch.equal(logits(plain, "t5"), expected(()))
    assert [set(vars(m)) for m in plain.modules()] == [set(vars(m)) for m in bare("t5").modules()]


def parameters_of(model: PeftModel, name: str) -> list[Tensor]:
    if name in model.prompt_encoder:
        return list(model.prompt_encoder[name].parameters())
    return list(adapter_parameters(model.get_base_model(), name))
