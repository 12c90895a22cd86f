"""Parameters that hold the weights of experts, under LoRA: however their module reads them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from deltatune import (
    BottleneckConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from deltatune.errors import ConfigError, StateError, TargetError
from deltatune.fused.layer import FusedLayer
from deltatune.fused.weight import LowRankWeight
from deltatune.inspect import inspect_adapter
from deltatune.trace import trace
from tests.core.moe import ARCHITECTURES, BOTH, READINGS, ids, moe

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def config(**options):
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": list(BOTH), **options})


def adapted(name, reading=None, scatter=True, **options):
    model = get_peft_model(moe(name, reading=reading), config(**options))
    return moved(model) if scatter else model


def moved(model, seed=3, scale=0.3):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=scale)
    return model.eval()


def by_hand(name, reading, model, adapter="default"):
    """The base with every expert's matrix changed as the equation says, one expert after the other."""
    plain = moe(name, reading=reading)
    for path, layer in fused(model):
        owner = plain.get_submodule(path)
        turned = getattr(owner, "is_transposed", False)
        for parameter, part in layer.adapters[adapter].each.items():
            stored = getattr(owner, parameter)
            E, r = len(stored), part.r
            for e in range(E):
                A = part.lora_A.weight[e * r : (e + 1) * r]
                B = part.lora_B.weight[:, e::E]
                update = part.lora_alpha / r * B @ A
                with torch.no_grad():
                    stored[e] += update.T if turned else update
    return plain


def fused(model):
    base = model.get_base_model()
    return [(path, module) for path, module in base.named_modules() if isinstance(module, FusedLayer)]


def logits(model, **kwargs):
    return model(input_ids=ids(), **kwargs).logits


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_expert_has_its_own_update(name, reading):
    model = adapted(name, reading)
    with model.disable_adapter():
        base = logits(model)
    assert torch.equal(base, logits(moe(name, reading=reading)))
    assert (logits(model) - base).abs().max() > 0.1
    assert_close(logits(model), logits(by_hand(name, reading, model)), **CLOSE)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fresh_adapter_changes_nothing(name):
    assert_close(logits(adapted(name, scatter=False)), logits(moe(name)), rtol=0, atol=0)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
def test_no_dense_matrix_is_built(name, reading, monkeypatch):
    model = adapted(name, reading)
    built = []
    inherited = LowRankWeight.__mro__[1].__torch_function__.__func__

    def count(cls, func, types, args=(), kwargs=None):
        answer = inherited(cls, func, types, args, kwargs)
        if isinstance(answer, torch.Tensor) and answer.numel() > 1:
            built.append(func)
        return answer

    monkeypatch.setattr(LowRankWeight.__mro__[1], "__torch_function__", classmethod(count))
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert not built


@pytest.mark.parametrize("reading", READINGS)
def test_gradients_are_those_of_the_dense_matrices(reading):
    model = adapted("mixtral", reading)
    model(input_ids=ids(), labels=ids()).loss.backward()
    plain = by_hand("mixtral", reading, model)
    plain.requires_grad_(True)
    plain(input_ids=ids(), labels=ids()).loss.backward()
    for path, layer in fused(model):
        for name, part in layer.adapters["default"].each.items():
            G = getattr(plain.get_submodule(path), name).grad  # (E, out, in)
            for e in range(4):
                A, B = part.lora_A.weight[2 * e : 2 * e + 2], part.lora_B.weight[:, e::4]
                assert_close(part.lora_A.weight.grad[2 * e : 2 * e + 2], 1.5 * B.T @ G[e], **CLOSE)
                assert_close(part.lora_B.weight.grad[:, e::4], 1.5 * G[e] @ A.T, **CLOSE)


def test_experts_that_no_token_reaches_get_no_gradient():
    model = adapted("mixtral", "eager")
    experts = model.get_base_model().model.layers[0].mlp.experts
    x, chosen = torch.randn(3, 16), torch.tensor([[0], [2], [0]])
    experts(x, chosen, torch.ones(3, 1)).sum().backward()
    grad = experts.adapters["default"].each["down_proj"].lora_A.weight.grad
    assert grad[:2].abs().sum() > 0 and grad[4:6].abs().sum() > 0
    assert not grad[2:4].any() and not grad[6:].any()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merging_and_unmerging(name):
    model = adapted(name)
    expected, base = logits(model), logits(moe(name))
    before = {key: id(value) for key, value in model.named_parameters()}
    model.merge_adapter()
    assert_close(logits(model), expected, **CLOSE)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.unmerge_adapter()
    assert {key: id(value) for key, value in model.named_parameters()} == before
    assert torch.equal(logits(model), expected)
    merged = model.merge_and_unload()
    assert type(merged) is type(moe(name)) and not any(isinstance(m, FusedLayer) for m in merged.modules())
    assert_close(logits(merged), expected, **CLOSE)


def test_unloading_gives_the_model_back():
    model = adapted("gpt_oss")
    plain = model.unload()
    assert [key for key, _ in plain.named_parameters()] == [key for key, _ in moe("gpt_oss").named_parameters()]
    assert torch.equal(logits(plain), logits(moe("gpt_oss")))


def test_several_adapters_add_up_and_may_have_other_parameters():
    model = adapted("mixtral")
    one = logits(model)
    model.add_adapter("other", config(r=3, target_parameters=["experts.down_proj"], init_lora_weights=False))
    assert torch.equal(logits(model), one)
    model.set_adapter("other")
    two = logits(model)
    model.set_adapter(["default", "other"])
    both = logits(model)
    assert (both - one).abs().max() > 1e-3 and (both - two).abs().max() > 1e-3
    model.merge_adapter()
    assert_close(logits(model), both, **CLOSE)
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert torch.equal(logits(model), two)


@pytest.mark.parametrize("reading", READINGS)
def test_rows_of_one_batch_with_different_adapters(reading):
    model = adapted("mixtral", reading)
    model.add_adapter("other", config(r=3, init_lora_weights=False))
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model)
    with model.disable_adapter():
        alone["__base__"] = logits(model)
    for names in (["other", "__base__"], ["default", "other"], ["other", "other"]):
        mixed = logits(model, adapter_names=names)
        for row, name in enumerate(names):
            assert_close(mixed[row], alone[name][row], **CLOSE)


def test_rows_are_refused_where_the_module_does_not_see_tokens():
    model = adapted("llama4")
    with pytest.raises(StateError, match="Llama4TextExperts whose weight is read"):
        logits(model, adapter_names=["default", "__base__"])
    assert_close(logits(model, adapter_names=["default"] * 2), logits(model))


def test_saving_and_loading_gives_the_same_bits(tmp_path):
    model = adapted("mixtral", target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(moe("mixtral"), tmp_path)
    assert torch.equal(logits(again), logits(model))
    one = PeftModel.from_pretrained(moe("mixtral"), tmp_path, is_trainable=True)
    assert one.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_inspecting_and_tracing_know_it(tmp_path):
    model = adapted("mixtral", target_modules=["q_proj"], rank_pattern={r".*\.down_proj": 3})
    model.save_pretrained(tmp_path)
    assert inspect_adapter(tmp_path).problems == []
    stops = {stop.path: stop for stop in trace(model, {"input_ids": ids(), "labels": ids()}).layers}
    stop = stops["model.layers.1.mlp.experts"]
    names = [f"each.{name}.lora_{which}.weight" for name in ("gate_up_proj", "down_proj") for which in "AB"]
    assert [part.name for part in stop.adapters[0].parameters] == names
    status = model.get_model_status()
    assert status.num_adapter_layers == 4 and status.requires_grad == {"default": True}


def test_generating_with_a_cache_and_with_beams_of_different_adapters():
    model = adapted("mixtral")
    settings = {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(input_ids=ids(), use_cache=False, **settings)
    assert torch.equal(model.generate(input_ids=ids(), **settings), plain)
    beams = {"num_beams": 2, **settings}
    mixed = model.generate(input_ids=ids(), adapter_names=["default", "__base__"], **beams)
    with model.disable_adapter():
        base = model.generate(input_ids=ids(), **beams)
    assert torch.equal(mixed[0], model.generate(input_ids=ids(), **beams)[0]) and torch.equal(mixed[1], base[1])


def test_a_bare_model_with_adapters_injected():
    model = moe("mixtral")
    inject_adapter_in_model(config(init_lora_weights=False), model)
    tensors = get_peft_model_state_dict(model)
    other = moe("mixtral")
    inject_adapter_in_model(config(), other)
    found = set_peft_model_state_dict(other, tensors)
    assert not found.missing_keys and not found.unexpected_keys
    assert torch.equal(logits(other), logits(model))


def test_copies_are_whole_and_independent():
    model = adapted("mixtral")
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
        moved(twin, seed=9)
        assert torch.equal(logits(model), expected)


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointed in (False, True):
        model = adapted("mixtral")
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.train()
        model(input_ids=ids(), labels=ids()).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for one, two in zip(*grads, strict=True):
        assert_close(one, two)


@pytest.mark.parametrize("reading", READINGS)
def test_a_half_precision_base_with_float32_adapters(reading):
    model = get_peft_model(moe("mixtral", reading=reading).bfloat16(), config())
    moved(model)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    out = model(input_ids=ids(), labels=ids())
    out.loss.backward()
    wide = get_peft_model(moe("mixtral", reading=reading).bfloat16().float(), config())
    moved(wide)
    assert out.logits.dtype == torch.bfloat16
    assert_close(out.logits.float(), logits(wide), rtol=0.1, atol=0.1)
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_it_compiles_as_far_as_the_model_does():
    model = adapted("mixtral", "batched_mm")
    expected = logits(model)
    experts = model.get_base_model().model.layers[0].mlp.experts
    arguments = torch.randn(5, 16), torch.randint(4, (5, 2)), torch.rand(5, 2)
    compiled = torch.compile(experts, backend="eager", fullgraph=True)
    assert_close(compiled(*arguments), experts(*arguments), **CLOSE)
    model.disable_adapter_layers()
    assert_close(compiled(*arguments), experts.base_layer(*arguments), **CLOSE)
    model.enable_adapter_layers()
    assert torch.equal(logits(model), expected)


class Mixture(nn.Module):
    """Reads its experts in ways of its own."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.is_transposed = turned
        self.w = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x, read):
        return read(x, self.w)


class Kernel(torch.autograd.Function):
    """Code that asks no torch function of the weight, as kernels do."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x)
        return x @ w.sum(0).T

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return None, (grad.T @ x).expand(3, 4, 6)


READS = {
    "sum of two": lambda x, w: F.linear(x, w[0] + w[1]),
    "einsum": lambda x, w: torch.einsum("ti,eoi->teo", x, w),
    "slice": lambda x, w: torch.matmul(w[1:], x.T),
    "row per token": lambda x, w: torch.bmm(w[torch.tensor([2, 0, 2, 1])], x[:, :, None]),
    "mask": lambda x, w: x @ w[torch.tensor([True, False, True])].sum(0).T,
    "from the left": lambda x, w: x.mT.mT @ w.transpose(1, 2),
    "mT": lambda x, w: x @ w.mT,
    "permuted": lambda x, w: x @ w.permute(1, 0, 2)[0].T,
    "one below the other": lambda x, w: F.linear(x, w.reshape(12, 6)),
    "one number": lambda x, w: x * w[0, 1, 2],
    "unbind": lambda x, w: sum(F.linear(x, part) for part in w.unbind()),
    "iteration": lambda x, w: sum(F.linear(x, part) for part in w),
    "bias too": lambda x, w: F.linear(x, w[0], torch.ones(4).double()),
    "kernel": lambda x, w: Kernel.apply(x, w),
    "stack": lambda x, w: F.linear(x, torch.cat(list(w))),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("turned", [False, True])
def test_any_reading_sees_the_adapted_parameter(read, turned):
    torch.manual_seed(0)
    base = nn.ModuleDict({"m": Mixture(turned)}).double()
    model = moved(get_peft_model(base, config(target_parameters=["m.w"])))
    layer, x = model.get_base_model()["m"], torch.randn(4, 6).double()
    part = layer.adapters["default"].each["w"]
    A, B = part.lora_A.weight, part.lora_B.weight
    assert (A.shape, B.shape) == (((6, 4), (6, 6)) if turned else ((6, 6), (4, 6)))
    updates = [1.5 * B[:, e::3] @ A[2 * e : 2 * e + 2] for e in range(3)]
    dense = layer.base_layer.w + torch.stack([update.T if turned else update for update in updates])
    dense.retain_grad()
    got, expected = layer(x, READS[read]), READS[read](x, dense)
    assert_close(got, expected)
    grads = torch.autograd.grad(got.square().sum(), [A, B])
    assert_close(grads, torch.autograd.grad(expected.square().sum(), [A, B]))


def test_experts_one_below_the_other_are_indexed_without_a_dense_matrix():
    """As DBRX does, and from outside of the module that owns the parameter."""
    torch.manual_seed(0)
    owner = Mixture()
    owner.w = nn.Parameter(torch.randn(12, 6))
    model = moved(get_peft_model(nn.ModuleDict({"m": owner}), config(target_parameters=["m.w"])))
    layer = model.get_base_model()["m"]
    part, x = layer.adapters["default"].each["w"], torch.randn(4, 6)
    one = layer.w.view(3, 4, 6)[1]
    assert isinstance(one, LowRankWeight)
    dense = owner.w + 1.5 * part.lora_B.weight @ part.lora_A.weight
    assert_close(F.linear(x, one), F.linear(x, dense[4:8]))


def test_a_forward_of_the_instances_own_sees_the_adapted_parameter():
    """As programs that move a module's weights to a device for each call have it."""
    base = nn.ModuleDict({"m": Mixture()})
    inner = base["m"].forward
    base["m"].forward = lambda *args: inner(*args) + 0
    model = moved(get_peft_model(base, config(target_parameters=["m.w"])))
    layer, x = model.get_base_model()["m"], torch.randn(4, 6)
    with model.disable_adapter():
        plain = layer(x, READS["mT"])
    assert (layer(x, READS["mT"]) - plain).abs().max() > 1e-2
    assert torch.equal(layer.base_layer.w, base["m"].base_layer.w)


def test_a_weight_that_is_written_to_is_refused():
    model = adapted("mixtral")
    experts = model.get_base_model().model.layers[0].mlp.experts
    with pytest.raises(StateError, match="is computed"):
        experts.down_proj.mul_(2)


def test_a_router_is_adapted_too():
    model = moved(get_peft_model(moe("mixtral"), config(target_parameters=["gate.weight", *BOTH])))
    with model.disable_adapter():
        base = logits(model)
    changed = logits(model)
    gate = model.get_base_model().model.layers[0].mlp.gate
    part = gate.adapters["default"].each["weight"]
    assert_close(gate.weight + 0, gate.base_layer.weight + 1.5 * part.lora_B.weight @ part.lora_A.weight)
    assert (changed - base).abs().max() > 1e-2
    assert_close(logits(model.merge_and_unload()), changed, **CLOSE)


def test_an_adapter_of_the_output_beside_one_of_the_parameters():
    model = adapted("mixtral")
    model.add_adapter("other", BottleneckConfig(target_modules=["experts"], size=4))
    model.set_adapter("other")
    nn.init.normal_(model.get_base_model().model.layers[0].mlp.experts.adapters["other"].adapter_up.weight)
    other = logits(model)
    model.set_adapter(["default", "other"])
    both = logits(model)
    model.set_adapter("default")
    assert (both - other).abs().max() > 1e-2 and (both - logits(model)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout=0.1"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"r": 50}, "r=50 is larger than both sides"),
        ({"target_modules": ["gate"], "target_parameters": ["gate.weight"]}, "gate"),
    ],
)
def test_options_that_the_maths_does_not_allow(options, words):
    base = moe("mixtral")
    with pytest.raises((ConfigError, TargetError), match=words):
        get_peft_model(base, config(**options))
    assert torch.equal(logits(base), logits(moe("mixtral"))) and not any(
        isinstance(module, FusedLayer) for module in base.modules()
    )


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["experts.gate_up_porj"], r"\['experts.gate_up_porj'\] match no parameter.*gate_up_proj"),
        (["input_layernorm.weight"], r"has shape \(16,\)"),
    ],
)
def test_names_that_do_not_fit(names, words):
    with pytest.raises(TargetError, match=words):
        get_peft_model(moe("mixtral"), config(target_parameters=names))


def test_a_parameter_of_the_model_itself_is_refused():
    with pytest.raises(TargetError, match="'w' is a parameter of the Mixture itself"):
        get_peft_model(Mixture(), config(target_parameters=["w"]))


def test_usual_layers_are_adapted_beside_parameters_unless_told_otherwise():
    named = get_peft_model(moe("mixtral"), config(target_modules=None))
    assert named.get_base_model().model.layers[0].self_attn.q_proj.adapters
    unknown = get_peft_model(nn.ModuleDict({"m": Mixture()}), config(target_modules=None, target_parameters=["m.w"]))
    assert [path for path, _ in fused(unknown)] == ["m"]


def test_ranks_by_parameter():
    model = adapted("mixtral", rank_pattern={r".*\.gate_up_proj": 4}, alpha_pattern={r".*\.down_proj": 8})
    each = model.get_base_model().model.layers[0].mlp.experts.adapters["default"].each
    assert (each["gate_up_proj"].r, each["down_proj"].r) == (4, 2)
    assert (each["gate_up_proj"].scaling, each["down_proj"].scaling) == (0.75, 4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("init_lora_weights", start) for start in ("pissa", "pissa_niter_2", "olora", "orthogonal", "eva", "corda")),
        *(("lora_dropout", 0.1), ("use_dora", True), ("lora_bias", True), ("alora_invocation_tokens", [1])),
    ],
)
def test_options_that_need_a_layer_are_refused_by_the_config(field, value):
    """PEFT fails when it builds them, with an AttributeError for the starts."""
    with pytest.raises(ConfigError, match="target_parameters") as error:
        LoraConfig(target_modules=[], target_parameters=["experts.down_proj"], **{field: value})
    assert error.value.field == field
    assert getattr(LoraConfig(target_modules=["q_proj"], **{field: value}), field) == value
