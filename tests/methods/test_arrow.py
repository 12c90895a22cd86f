"""Arrow against arXiv 2405.11157, section 4.2: experts by |x . v|, v the first right singular vector of each B A.

General knowledge subtraction: aclanthology.org/2025.acl-short.54.
"""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import ArrowConfig, LoraConfig, PeftModel, create_arrow_model, get_peft_model
from deltatune.errors import ConfigError, MergeError, PeftError, StateError
from deltatune.lora.variants.arrow import first_right_singular_vector
from tests.core.tiny import batch, logits, tiny
from tests.laws.examples import base_values, move, same

TARGETS = ["q_proj", "down_proj"]


def saved(folder, seed: int, **options) -> str:
    base = tiny("llama")
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(base, config)
    move(model, 0.3)
    model.save_pretrained(folder / str(seed))
    return str(folder / str(seed))


def routed(folder, experts: int = 4, general: int = 0, **options) -> PeftModel:
    tasks = [saved(folder, seed) for seed in range(experts)]
    base = [saved(folder, 10 + seed) for seed in range(general)]
    config = ArrowConfig(**{"top_k": 2, **options})
    return create_arrow_model(tiny("llama"), tasks, config, general_adapter_paths=base or None)


def by_hand(layer, x: torch.Tensor, names: list[str], top_k: int, temperature: float = 1.0, general=()) -> torch.Tensor:
    """Token by token, with the singular value decomposition of every dense update."""
    mean_A = torch.stack([layer.adapters[name].lora_A.weight for name in general]).mean(0) if general else 0
    mean_B = torch.stack([layer.adapters[name].lora_B.weight for name in general]).mean(0) if general else 0
    pairs = [
        (layer.adapters[name].lora_A.weight - mean_A, layer.adapters[name].lora_B.weight - mean_B) for name in names
    ]
    scales = [layer.adapters[name].scaling for name in names]
    first = [torch.linalg.svd((B @ A).double())[2][0].float() for A, B in pairs]
    out = layer.base_layer(x).flatten(0, -2).clone()
    for index, token in enumerate(x.flatten(0, -2)):
        scores = [abs(float(token.detach() @ v.detach())) for v in first]
        chosen = sorted(range(len(names)), key=lambda e: -scores[e])[:top_k]
        weights = torch.tensor([scores[e] / temperature for e in chosen]).softmax(0)
        for weight, e in zip(weights, chosen):
            A, B = pairs[e]
            out[index] += weight * scales[e] * (B @ (A @ token))
    return out.reshape(*x.shape[:-1], -1)


def layer_of(model: PeftModel):
    return model.get_base_model().model.layers[1].self_attn.q_proj


@pytest.mark.parametrize("top_k,temperature", [(1, 1.0), (2, 0.3), (4, 2.0), (9, 1.0)])
def test_every_token_goes_through_its_nearest_experts(tmp_path, top_k, temperature):
    model = routed(tmp_path, top_k=top_k, router_temperature=temperature)
    assert model.active_adapters == ["arrow_router"]
    layer, x = layer_of(model), torch.randn(2, 5, 16)
    names = [f"task_{i}" for i in range(4)]
    assert model.peft_config["arrow_router"].arrow_config.task_adapter_names == names
    with torch.no_grad():
        expected = by_hand(layer, x, names, top_k, temperature)
        assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        assert_close(layer(x[0]), expected[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(layer(x), layer(x)), "nothing is drawn"


def test_general_knowledge_is_subtracted_and_the_experts_stay_what_they_were(tmp_path):
    """PEFT subtracts it from the experts' own weights."""
    model = routed(tmp_path, experts=3, general=2, use_gks=True)
    layer, x = layer_of(model), torch.randn(2, 5, 16)
    names = [f"task_{i}" for i in range(3)]
    before = model.adapter_tensors("task_0")["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].clone()
    with torch.no_grad():
        assert_close(layer(x), by_hand(layer, x, names, 2, general=["gks_0", "gks_1"]), rtol=1e-4, atol=1e-4)
    after = model.adapter_tensors("task_0")["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    assert torch.equal(before, after)


def test_without_use_gks_general_adapters_are_not_loaded(tmp_path):
    model = routed(tmp_path, experts=2, general=1)
    assert list(model.peft_config) == ["task_0", "task_1", "arrow_router"]


def test_the_first_right_singular_vector_is_that_of_the_dense_product():
    torch.manual_seed(0)
    A, B = torch.randn(3, 20), torch.randn(15, 3)
    v = torch.linalg.svd(B @ A)[2][0]
    got = first_right_singular_vector(A, B)
    assert_close(got * (got @ v).sign(), v, rtol=1e-4, atol=1e-5)
    assert not first_right_singular_vector(A, torch.zeros(15, 3)).any(), "an untrained adapter is aligned with nothing"


def test_adapters_that_come_and_go_are_experts_or_are_not(tmp_path):
    model = routed(tmp_path, experts=2)
    layer, x = layer_of(model), torch.randn(2, 5, 16)
    with torch.no_grad():
        layer(x)
        model.load_adapter(saved(tmp_path, 7, r=2), "late")
        assert_close(layer(x), by_hand(layer, x, ["task_0", "task_1", "late"], 2), rtol=1e-4, atol=1e-4)
        model.delete_adapter("task_0")
        assert_close(layer(x), by_hand(layer, x, ["task_1", "late"], 2), rtol=1e-4, atol=1e-4)
        model.delete_adapter("task_1"), model.delete_adapter("late")
        assert torch.equal(layer(x), layer.base_layer(x))


def test_what_is_kept_of_an_expert_is_never_old(tmp_path):
    model = routed(tmp_path, experts=2)
    layer, x = layer_of(model), torch.randn(2, 5, 16)
    expert, names = layer.adapters["task_0"], ["task_0", "task_1"]
    with torch.no_grad():
        layer(x)
        expert.lora_B.weight.mul_(-2)
        assert_close(layer(x), by_hand(layer, x, names, 2), rtol=1e-4, atol=1e-4)
        model.load_adapter(saved(tmp_path, 5), "task_0")
        assert_close(layer(x), by_hand(layer, x, names, 2), rtol=1e-4, atol=1e-4)
        model.set_adapter("task_0")
        expert.lora_A.weight.data.add_(1)  # as a fused optimizer, uncounted
        model.set_adapter("arrow_router")
        assert_close(layer(x), by_hand(layer, x, names, 2), rtol=1e-4, atol=1e-4)


def test_nothing_of_it_trains(tmp_path):
    model = routed(tmp_path, experts=2)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_adapter("task_0")
    assert all(("task_0" in name) == p.requires_grad for name, p in model.named_parameters() if "adapters" in name)


def test_rows_generation_and_copies(tmp_path):
    model = routed(tmp_path, experts=3)
    inputs = {key: value for key, value in batch("llama", rows=3).items() if key != "labels"}
    with torch.no_grad():
        whole = logits(model, inputs)
        mixed = model(**inputs, adapter_names=["arrow_router", "task_1", "__base__"]).logits
        assert_close(mixed[0], whole[0], rtol=1e-4, atol=1e-5)
        model.set_adapter("task_1")
        assert_close(mixed[1], logits(model, inputs)[1], rtol=1e-4, atol=1e-5)
        model.set_adapter("arrow_router")
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin, inputs), whole)
        layer_of(twin).adapters["task_0"].lora_B.weight.zero_()
        assert torch.equal(logits(model, inputs), whole) and not torch.equal(logits(twin, inputs), whole)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **options, use_cache=False))


def test_folders_hold_all_of_it(tmp_path):
    model = routed(tmp_path, experts=2, general=1, use_gks=True)
    inputs = batch("llama")
    model.save_pretrained(tmp_path / "all")
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "all" / "task_0", adapter_name="task_0")
    for name in ("task_1", "gks_0", "arrow_router"):
        again.load_adapter(tmp_path / "all" / name, name)
    again.set_adapter("arrow_router")
    with torch.no_grad():
        assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_it_cannot_be_merged(tmp_path):
    model = routed(tmp_path, experts=2)
    with pytest.raises(MergeError, match="every token has experts of its own"):
        model.merge_adapter()


@pytest.mark.parametrize(
    "options,word",
    [
        ({"use_dora": True}, "use_dora"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"kasa_config": {}}, "kasa_config"),
        ({"modules_to_save": ["norm"]}, "trains whole modules"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "linear layers"),
    ],
)
def test_adapters_that_cannot_be_experts_are_refused_and_the_base_is_as_it_was(tmp_path, options, word):
    base = tiny("llama")
    before = base_values(base)
    paths = [saved(tmp_path, 0), saved(tmp_path, 1, **options)]
    with pytest.raises(ConfigError, match=word):
        create_arrow_model(base, paths, ArrowConfig())
    assert same(base_values(base), before) and not any("adapters" in name for name, _ in base.named_modules())


def test_what_makes_no_sense_is_refused(tmp_path):
    base, path = tiny("llama"), saved(tmp_path, 0)
    for arguments, word in [
        (([], ArrowConfig()), "task_specific_adapter_paths"),
        (([path], ArrowConfig(use_gks=True)), "general_adapter_paths"),
        (([path, str(tmp_path / "nowhere")], ArrowConfig()), "nowhere"),
    ]:
        with pytest.raises(PeftError, match=word):
            create_arrow_model(base, *arguments)
        assert not any("adapters" in name for name, _ in base.named_modules())
    with pytest.raises(ConfigError, match="use_gks=True subtracts factors of equal rank"):
        create_arrow_model(base, [path], ArrowConfig(use_gks=True), [saved(tmp_path, 1, r=2)])
    for field, value in [("top_k", 0), ("router_temperature", 0.0), ("use_gks", 1)]:
        with pytest.raises(ConfigError, match=f"ArrowConfig: {field}="):
            ArrowConfig(**{field: value})
    for more in ({"use_dora": True}, {"use_qalora": True}, {"lora_bias": True}):
        (name,) = more
        with pytest.raises(ConfigError, match=f"{name} and arrow_config=.* cannot be set together"):
            LoraConfig(arrow_config=ArrowConfig(), **more)


def test_an_adapter_of_another_kind_beside_the_router_is_named(tmp_path):
    model = routed(tmp_path, experts=2)
    model.add_adapter("dora", LoraConfig(use_dora=True, target_modules=TARGETS, r=2))
    with pytest.raises(StateError, match="adapter 'dora' cannot be an expert"):
        model(**batch("llama"))
    model.delete_adapter("dora")
    model(**batch("llama"))


def test_half_precision_and_dropout():
    torch.manual_seed(0)
    base = nn.ModuleDict({"layer": nn.Linear(16, 12).bfloat16()})
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["layer"]), adapter_name="one")
    model.add_adapter("arrow_router", LoraConfig(arrow_config={"top_k": 1}, target_modules=["layer"], lora_dropout=0.5))
    move(model, name="one")
    model.set_adapter("arrow_router")
    layer, x = model.get_base_model()["layer"], torch.randn(3, 4, 16).bfloat16()
    with torch.no_grad():
        assert layer.eval()(x).dtype == torch.bfloat16
        model.set_adapter("one")
        one = layer(x)
        model.set_adapter("arrow_router")
        assert_close(layer(x), one, rtol=0.02, atol=0.02)
        assert not torch.equal(layer.train()(x), layer(x))
