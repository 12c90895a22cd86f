"""Attentions outside of transformers' interface: followed through their own code, or refused."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from torch import nn

from deltatune import LoraConfig, PrefixTuningConfig, get_peft_model
from deltatune.errors import PeftWarning, StateError, TargetError
from deltatune.prompts.attention import SLOT
from deltatune.prompts.probe import survey
from tests.prompts.models import bare, batch, gradients, prefixed, redraw

OWN = ["bloom", "gptj", "mpt", "falcon", "rembert", "deberta", "xlnet", "mvp"]
DECODERS = ["bloom", "gptj", "mpt", "falcon", "falcon-alibi"]


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


# ---------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("sites", ["default", "encoder", "cross", "all"])
def test_hand_written_attention_equals_its_twin_in_the_interface(sites):
    """MVP is BART with attention of its own: the same weights and the same prefix give the same numbers."""
    twin, own = bare("bart"), bare("mvp")
    own.load_state_dict(twin.state_dict())
    expected, found = prefixed("bart", twin, sites=sites), prefixed("mvp", own, sites=sites)
    assert found.peft_config["default"].site_names == expected.peft_config["default"].site_names
    inputs = batch("bart")
    torch.testing.assert_close(logits(found, inputs), logits(expected, inputs), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(found, inputs), gradients(expected, inputs), atol=1e-6, rtol=1e-4)


def test_it_is_the_joint_softmax_of_prefix_and_tokens():
    """RemBERT's attention, written out: softmax([q P_k; q k] / sqrt(d) + mask) [P_v; v]."""
    model, inputs = prefixed("rembert"), batch("rembert")
    found = logits(model, inputs)
    pairs = model.prefixes["default"].keys_values()
    base = bare("rembert")

    def attention(module, pair, hidden, attention_mask, **_):
        q, k, v = (
            layer(hidden).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (module.query, module.key, module.value)
        )
        k, v = (torch.cat([part.expand(len(hidden), -1, -1, -1), x], 2) for part, x in zip(pair, (k, v)))
        scores = q @ k.mT / 8**0.5 + nn.functional.pad(attention_mask, (4, 0))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), None

    for name, pair in pairs.items():
        module = base.get_submodule(name)
        module.forward = functools.partial(attention, module, pair)
    torch.testing.assert_close(found, logits(base, inputs), atol=1e-5, rtol=1e-5)


def test_following_a_softmax_and_lengthening_a_fused_attention_agree():
    fused, followed = (prefixed("falcon", bare("falcon", attention)) for attention in ("sdpa", "eager"))
    for left in (False, True):
        inputs = batch("falcon", left)
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(logits(fused, inputs)[real], logits(followed, inputs)[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("attention", [None, "eager"])
def test_a_row_does_not_see_its_padding_nor_its_neighbours(name, attention):
    """Left padding makes rows without a single visible token, and moves every place that a bias could count from."""
    model, inputs = prefixed(name, bare(name, attention)), batch(name, left=True)
    if "position_ids" in inspect.signature(model.get_base_model().forward).parameters:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    together = logits(model, inputs)
    assert together.isfinite().all()
    alone = logits(model, {key: tensor[1:, 3:] for key, tensor in inputs.items()})
    torch.testing.assert_close(together[1:, 3:], alone, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_cached_decoding_says_what_one_pass_says(name):
    model, inputs = prefixed(name), batch(name)
    ids = inputs["input_ids"][:1]
    whole, cache, steps = logits(model, {"input_ids": ids}), None, []
    for token in ids.split(1, dim=1):
        with torch.no_grad():
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=2e-4, rtol=1e-4)


def test_dropout_takes_columns_of_the_prefix_too():
    kept, dropped = (bare("rembert").train() for _ in range(2))
    for name, module in dropped.named_modules():
        if name.endswith("attention.self.dropout"):
            module.p = 1.0
    inputs = batch("rembert")
    assert max(grad.abs().max() for grad in gradients(prefixed("rembert", kept).train(), inputs)) > 0
    assert all((grad == 0).all() for grad in gradients(prefixed("rembert", dropped).train(), inputs))


# ------------------------------------------------------------------------------------------------------------ its life


@pytest.mark.parametrize("name", OWN)
def test_copies_work_alone_and_detaching_leaves_nothing_behind(name):
    base, inputs = bare(name), batch(name)
    before, bare_logits = [dict(vars(module)) for module in base.modules()], logits(base, inputs)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.modules()]
    model = prefixed(name, base)
    expected = logits(model, inputs)
    assert (expected - bare_logits).abs().max() > 1e-2
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, inputs), expected)
        redraw(twin, seed=4)
        assert not torch.equal(logits(twin, inputs), expected)
        assert torch.equal(logits(model, inputs), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), bare_logits)
    model.delete_adapter("default")
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.modules()] == hooks
    assert [vars(module).keys() for module in base.modules()] == [kept.keys() for kept in before]
    assert torch.equal(logits(base, inputs), bare_logits)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", ["bloom", "falcon", "mvp"])
def test_recomputed_layers_see_the_same_prefix(name, projection):
    model, inputs = prefixed(name, prefix_projection=projection).train(), batch(name)
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(model, inputs), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bloom", "falcon", "deberta"])
def test_half_precision_stays_near(name, dtype):
    inputs = batch(name)
    expected = logits(prefixed(name), inputs)
    found = logits(prefixed(name, bare(name).to(dtype)), inputs)
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.slow  # half a minute
def test_it_compiles_to_one_graph():
    model, inputs = prefixed("bloom"), batch("bloom")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits, atol=1e-5, rtol=1e-5
    )
    torch._dynamo.reset()


def test_threads_with_different_choices_do_not_meet():
    model, inputs = prefixed("gptj"), batch("gptj")

    def run(disabled: bool) -> torch.Tensor:
        if not disabled:
            return logits(model, inputs)
        with model.disable_adapter():
            return logits(model, inputs)

    expected = [run(False), run(True)]
    with ThreadPoolExecutor(4) as pool:
        for index, found in enumerate(pool.map(run, [False, True] * 10)):
            assert torch.equal(found, expected[index % 2])


def test_prefix_and_lora_work_together():
    model, inputs = prefixed("gptj"), batch("gptj")
    expected = logits(model, inputs)
    model.add_adapter("low", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]))
    model.set_adapter(["default", "low"])
    torch.testing.assert_close(logits(model, inputs), expected)  # LoRA starts at zero
    gradients(model.train(), inputs)
    assert all(p.grad is not None for path, p in model.named_parameters() if "lora_B" in path)


def test_an_error_inside_leaves_no_mode_on():
    model, inputs = prefixed("bloom"), batch("bloom")
    expected = logits(model, inputs)
    with pytest.raises(RuntimeError):
        model(inputs_embeds=torch.zeros(1, 3, 31))
    with pytest.raises(RuntimeError):
        model(input_ids=inputs["input_ids"], attention_mask=torch.ones(2, 3))
    assert torch.overrides._get_current_function_mode() is None
    assert torch.equal(logits(model, inputs), expected)


# ----------------------------------------------------------------------------------------------------------- the probe


class Attention(nn.Module):
    """Plain attention of two heads with a trick to play."""

    def __init__(self, trick: str) -> None:
        super().__init__()
        self.trick = trick
        self.mix = nn.Linear(8, 24)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        count = len(hidden)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.mix(hidden).chunk(3, -1))
        if self.trick == "heads outside":
            q, k, v = (part.transpose(0, 1).flatten(0, 1) for part in (q, k, v))
        elif self.trick == "rows outside":
            q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        scores = q @ k.mT * 0.5
        if self.trick == "unknown operation":
            scores = scores.square()
        elif self.trick == "hidden from sight":
            with torch._C.DisableTorchFunction():
                scores.mul_(3.0)
        elif self.trick == "soft cap":
            scores = 2.0 * torch.tanh(scores / 2.0)
        out = scores.softmax(-1) @ v
        if self.trick == "heads outside":
            out = out.unflatten(0, (2, count)).transpose(0, 1)
        elif self.trick == "rows outside":
            out = out.unflatten(0, (count, 2))
        return out.transpose(1, 2).flatten(2)


class Model(transformers.PreTrainedModel):
    config_class = transformers.PretrainedConfig

    def __init__(self, config: transformers.PretrainedConfig, trick: str) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(32, 8)
        self.mixer = Attention(trick)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.mixer(self.embed(input_ids))


def tricky(trick: str) -> Model:
    torch.manual_seed(0)
    return Model(transformers.PretrainedConfig(vocab_size=32), trick).eval()


@pytest.mark.parametrize("trick", ["none", "rows outside", "soft cap"])
def test_what_can_be_followed_is_a_site_whatever_its_class_is_called(trick):
    found = survey(tricky(trick))
    assert [(site.name, site.shape) for site in found.sites] == [("mixer", (2, 4, 2, 4))]
    model = get_peft_model(tricky(trick), PrefixTuningConfig(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION"))
    redraw(model)
    ids = torch.tensor([[4, 5, 6], [7, 8, 9]])
    keys, values = model.prefixes["default"].keys_values()["mixer"]
    base = tricky(trick)
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in base.mixer.mix(base.embed(ids)).chunk(3, -1))
    scores = q @ torch.cat([keys.expand(2, -1, -1, -1), k], 2).mT * 0.5
    scores = 2 * (scores / 2).tanh() if trick == "soft cap" else scores
    expected = (scores.softmax(-1) @ torch.cat([values.expand(2, -1, -1, -1), v], 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(model(input_ids=ids), expected)


@pytest.mark.parametrize("trick", ["heads outside", "unknown operation", "hidden from sight"])
def test_what_cannot_be_followed_is_refused_by_name(trick):
    with pytest.raises(TargetError, match="Attention at 'mixer'"):
        get_peft_model(tricky(trick), PrefixTuningConfig(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION"))


def test_a_call_that_goes_another_way_than_the_trial_raises():
    model = get_peft_model(tricky("none"), PrefixTuningConfig(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION"))
    model.base_model.mixer.trick = "unknown operation"
    with pytest.raises(StateError, match="could not be followed"):
        model(input_ids=torch.tensor([[4, 5, 6]]))
    model.base_model.mixer.trick = "rows outside"
    with pytest.raises(StateError, match="trial pass did not show"):
        model(input_ids=torch.tensor([[4, 5, 6]]))


def test_a_part_that_is_reached_is_taken_with_a_warning():
    """Longformer: its global tokens attend as usual, its local ones along a diagonal."""
    with pytest.warns(PeftWarning, match=r"LongformerSelfAttention at 'longformer\.encoder\.layer\.0.*a part of its"):
        model = prefixed("longformer")
    assert len(model.peft_config["default"].site_names) == 2
    with pytest.raises(TargetError, match="a part of its attention"):
        prefixed("longformer", sites=r".*layer\.0\.attention\.self")


def test_a_module_with_several_streams_of_attention_is_refused():
    with pytest.raises(TargetError, match="ProphetNetNgramSelfAttention"):
        prefixed("prophetnet")
    assert {site.kind for site in survey(bare("prophetnet")).sites} == {"encoder", "cross"}


def test_only_modules_with_attention_of_their_own_are_hooked():
    model = prefixed("bloom").get_base_model()
    sites = [module for module in model.modules() if SLOT in vars(module)]
    hooked = [
        module
        for module in model.modules()
        if module._forward_hooks and not isinstance(module, transformers.PreTrainedModel)
    ]
    assert hooked == sites and len(sites) == 2
    interface = prefixed("llama").get_base_model()
    assert not any(
        module._forward_hooks for module in interface.modules() if not isinstance(module, transformers.PreTrainedModel)
    )


@pytest.mark.parametrize("name", ["bloom", "rembert", "deberta"])
def test_a_prefix_of_text_is_what_the_attention_computes_for_it(name):
    """In the first layer the keys and values of a token do not depend on the others: projections of its embedding."""
    ids = [5, 6, 7, 8]
    model = prefixed(name, init_token_ids=ids)
    base = model.get_base_model()
    first = model.peft_config["default"].site_names[0]
    module = base.get_submodule(first)
    seen = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args or tuple(kwargs.values()))[0]), with_kwargs=True
    )
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    if name == "bloom":
        _, key, value = module.query_key_value(seen[0]).unflatten(-1, (4, 3, 8)).unbind(-2)
    else:
        projections = (module.key, module.value) if name == "rembert" else (module.key_proj, module.value_proj)
        key, value = (projection(seen[0]).unflatten(-1, (4, 8)) for projection in projections)
    found = model.prefixes["default"].keys_values()[first]
    torch.testing.assert_close(found, (key[0].transpose(0, 1), value[0].transpose(0, 1)))


def test_numbers_of_peft_are_refused_where_its_shift_is_not_known(tmp_path):
    with pytest.raises(TargetError, match=r"cannot be moved.*layout='native'"):
        prefixed("gptj", layout="peft")
    with pytest.raises(TargetError, match="code of its own"):
        prefixed("gptj").save_pretrained(tmp_path, format="peft")
    assert not list(tmp_path.iterdir())
