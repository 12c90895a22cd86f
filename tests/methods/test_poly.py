"""Poly against arXiv 2202.13914, section 3: skills A_s, B_s mixed by Z = sigmoid(logits of the task) / sum, per row.

With splits (2211.03831, section 3) each part of the input and of the output has a mixture of its own.
"""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import MultitaskPromptTuningConfig, PolyConfig, call_values, get_peft_model, inject_adapter_in_model
from deltatune.errors import ConfigError, DataError, MergeError, StateError
from tests.core.tiny import batch, tiny
from tests.laws.examples import adapters, move


def adapted(shake: bool = True, **options):
    torch.manual_seed(0)
    options = {"r": 3, "n_tasks": 3, "n_skills": 2, **options}
    base = nn.ModuleDict({"layer": nn.Linear(6, 4)})
    model = get_peft_model(base, PolyConfig(target_modules=["layer"], **options)).double().eval()
    layer = model.get_base_model()["layer"]
    if shake:
        for parameter in layer.adapters.parameters():
            nn.init.normal_(parameter)
    return model, layer, layer.adapters["default"]


def by_hand(part, weight, task: int) -> torch.Tensor:
    """W + sum over skills and splits, entry by entry."""
    delta = torch.zeros(4, 6, dtype=torch.float64)
    wide, high = 6 // part.n_splits, 4 // part.n_splits
    logits = part.poly_router.module_logits[task].reshape(part.n_splits, part.n_skills)
    Z = torch.stack([row.sigmoid() / row.sigmoid().sum() for row in logits])
    for i in range(6):
        for o in range(4):
            p, q = i // wide, o // high
            A = sum(Z[p, s] * part.poly_lora_A[p, s, i % wide] for s in range(part.n_skills))
            B = sum(Z[q, s] * part.poly_lora_B[q, s, :, o % high] for s in range(part.n_skills))
            delta[o, i] = (A * B).sum() / part.r
    return weight + delta


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_each_row_has_the_weight_of_its_task(splits, leading):
    model, layer, part = adapted(n_splits=splits)
    x, tasks = torch.randn(4, *leading, 6, dtype=torch.float64), torch.tensor([2, 0, 2, 1])
    with call_values(model.get_base_model(), task_ids=tasks):
        out = layer(x)
    for row, task in enumerate(tasks):
        weight = by_hand(part, layer.base_layer.weight, int(task))
        assert_close(out[row], x[row] @ weight.T + layer.base_layer.bias)


def test_with_one_task_it_is_a_weight_that_merges():
    _model, layer, part = adapted(n_tasks=1)
    weight = by_hand(part, layer.base_layer.weight, 0)
    assert_close(layer.stored_weight(["default"]), weight)
    x = torch.randn(5, 6, dtype=torch.float64)
    assert_close(layer(x), x @ weight.T + layer.base_layer.bias)
    _, layer, _ = adapted()
    with pytest.raises(MergeError, match="each row has the weight of its task"):
        layer.weight + 0


@pytest.mark.parametrize("n_tasks", [1, 3])
def test_in_training_the_mixture_is_drawn_for_each_row(n_tasks):
    """From RelaxedBernoulli(1, logits): sigmoid(logits + log u - log(1 - u))."""
    model, layer, part = adapted(n_tasks=n_tasks, n_skills=5)
    model.train()
    x = torch.randn(1, 6, dtype=torch.float64).expand(64, 6)
    tasks = torch.full((64,), n_tasks - 1)
    with call_values(model.get_base_model(), task_ids=tasks):
        assert layer(x).std(dim=0).min() > 0.01
        torch.manual_seed(1)
        out = layer(x)
    torch.manual_seed(1)
    u = torch.rand(64, 1, 5, dtype=torch.float64)
    Z = (part.poly_router.module_logits[tasks].reshape(64, 1, 5) + u.log() - (1 - u).log()).sigmoid()
    Z = (Z / Z.sum(-1, keepdim=True))[:, 0]
    A = torch.einsum("bs,sir->bir", Z, part.poly_lora_A[0])
    B = torch.einsum("bs,sro->bro", Z, part.poly_lora_B[0])
    assert_close(out, layer.base_layer(x) + torch.einsum("bi,bir,bro->bo", x, A, B) / 3)


def test_counts_and_start():
    _, layer, part = adapted(shake=False, n_splits=2)
    assert sum(p.numel() for p in part.parameters()) == 2 * 2 * 3 * 3 + 2 * 2 * 3 * 2 + 3 * 2 * 2
    assert part.poly_router.module_logits.abs().max() <= 1e-3 and part.poly_lora_A.abs().min() > 0
    _, layer, _ = adapted(shake=False, init_weights=False, n_tasks=1)
    assert not torch.allclose(layer.stored_weight(["default"]), layer.base_layer.weight)


@pytest.mark.parametrize(
    "tasks,expected", [(None, "pass task_ids"), ([0, 3], r"\[3\]"), ([-1, 0], r"\[-1\]"), ([0.5, 1.0], "integer")]
)
def test_tasks_that_there_are_not_are_refused(tasks, expected):
    model, layer, _ = adapted()
    with pytest.raises(DataError, match=expected), call_values(model.get_base_model(), task_ids=tasks):
        layer(torch.randn(2, 6, dtype=torch.float64))
    with (
        pytest.raises(StateError, match="3 entries for a batch of 2"),
        call_values(model.get_base_model(), task_ids=[0, 1, 2]),
    ):
        layer(torch.randn(2, 6, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"n_splits=3.* is 2"):
        adapted(n_splits=3)


# ---------------------------------------------------------------------------------------------------- through a model


def tasked(arch: str = "llama", **options):
    names = {"target_modules": ["q", "v"]} if arch == "t5" else {"target_modules": ["q_proj", "down_proj"]}
    task = "SEQ_2_SEQ_LM" if arch == "t5" else "CAUSAL_LM"
    model = get_peft_model(tiny(arch), PolyConfig(task_type=task, r=2, n_tasks=3, **{**names, **options})).eval()
    torch.manual_seed(3)
    move(model, 0.5)
    return model


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_rows_of_different_tasks_are_those_rows_alone(arch):
    model, inputs = tasked(arch), batch(arch, rows=3)
    inputs.pop("labels")
    if arch == "t5":
        inputs["decoder_input_ids"] = torch.tensor([[0, 4, 9]] * 3)
    mixed = model(**inputs, task_ids=[2, 0, 1]).logits
    for row, task in enumerate([2, 0, 1]):
        part = {key: value[row : row + 1] for key, value in inputs.items()}
        assert_close(model(**part, task_ids=task).logits, mixed[row : row + 1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed, model(**inputs, task_ids=0).logits, atol=1e-3)
    with pytest.raises(DataError, match="task_ids"):
        model(**inputs)
    with model.disable_adapter():
        model(**inputs)


@pytest.mark.parametrize("arch", ["llama", "t5"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_generation_knows_the_tasks_at_every_step(arch, settings):
    model, ids = tasked(arch), torch.tensor([[5, 9, 12, 4], [8, 3, 3, 7]])
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, **settings}
    mixed = model.generate(input_ids=ids, task_ids=[2, 0], **settings)
    for row, task in enumerate([2, 0]):
        alone = model.generate(input_ids=ids[row : row + 1], task_ids=torch.tensor([task]), **settings)
        assert torch.equal(alone, mixed[row : row + 1])


def test_tasks_follow_the_rows_of_a_mixed_batch_and_prompts_read_them_too():
    model, inputs = tasked(), batch("llama", rows=4)
    inputs.pop("labels")
    model.add_adapter("other", PolyConfig(task_type="CAUSAL_LM", r=2, n_tasks=3, target_modules=["v_proj"]))
    move(model, 0.5, "other")
    names, tasks = ["other", "default", "__base__", "other"], [0, 2, 1, 1]
    mixed = model(**inputs, adapter_names=names, task_ids=tasks).logits
    generated = model.generate(**inputs, adapter_names=names, task_ids=tasks, max_new_tokens=3, min_new_tokens=3)
    for row, (name, task) in enumerate(zip(names, tasks)):
        part = {key: value[row : row + 1] for key, value in inputs.items()}
        assert_close(
            model(**part, adapter_names=[name], task_ids=[task]).logits, mixed[row : row + 1], rtol=1e-4, atol=1e-5
        )
        alone = model.generate(**part, adapter_names=[name], task_ids=[task], max_new_tokens=3, min_new_tokens=3)
        assert torch.equal(alone, generated[row : row + 1])
    prompt = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_tasks=3)
    model.add_adapter("prompt", prompt)
    model.set_adapter(["default", "prompt"])
    both = model(**inputs, task_ids=tasks).logits
    assert not torch.allclose(both, model(**inputs, task_ids=[1, 2, 1, 1]).logits, atol=1e-4)
    model.generate(**inputs, task_ids=tasks, max_new_tokens=2)


def test_checkpointing_of_either_kind_gives_the_same_gradients():
    found = []
    for reentrant in (None, False, True):
        model = tasked().train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        torch.manual_seed(0)
        out = model(**batch("llama"), task_ids=[2, 1], use_cache=False)
        out.loss.backward()
        found.append([p.grad for p in adapters(model)])
    for one, *others in zip(*found):
        assert one is not None and one.abs().max() > 0
        for other in others:
            assert_close(one, other)


def test_a_model_without_a_wrapper_gets_them_in_a_block_of_code():
    model, inputs = tiny("llama"), batch("llama")
    inject_adapter_in_model(PolyConfig(r=2, n_tasks=2, target_modules=["q_proj"]), model)
    torch.manual_seed(0)
    move(model, 0.5)
    with call_values(model, task_ids=[0, 1]):
        mixed = model(**inputs).logits
    with call_values(model, task_ids=1):
        assert_close(model(**inputs).logits[1], mixed[1], rtol=1e-4, atol=1e-5)
