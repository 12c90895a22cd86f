"""The loss of a model under `chunk_loss` is its own: value, gradients and logits, whatever is grafted onto it."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

import deltatune
from deltatune import LoraConfig, chunk_loss, get_peft_model
from deltatune.errors import StateError
from deltatune.kernels import linear_cross_entropy as kernel
from tests.core.tiny import TASKS, VOCAB, batch, tiny

CLOSE = {"rtol": 1e-4, "atol": 1e-6}
SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", 1)  # 16 rows at a time


def inputs_of(arch, rows=6):
    inputs = batch(arch, rows)
    labels = inputs["labels"].clone()
    labels[1, :3] = -100
    return {**inputs, "labels": labels}


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_and_gradients(model, inputs):
    torch.manual_seed(0)
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: None if p.grad is None else p.grad.clone() for name, p in trained(model).items()}


def assert_same(model, inputs, whole=None, **tolerance):
    """Loss and gradients with and without `chunk_loss`; returns its handle."""
    tolerance = {**CLOSE, **tolerance}
    loss, gradients = loss_and_gradients(model, inputs)
    stage = chunk_loss(model)
    try:
        found, others = loss_and_gradients(model, inputs)
        assert stage.whole == whole
    finally:
        stage.remove()
    assert_close(found, loss, **tolerance)
    assert any(g is not None for g in gradients.values())
    for name, gradient in gradients.items():
        assert (gradient is None) == (others[name] is None), name
        if gradient is not None:
            assert_close(others[name], gradient, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def gemma():
    config = transformers.Gemma2Config(**SIZES, **HEADS, final_logit_softcapping=2.0)
    return transformers.Gemma2ForCausalLM(config)


def cohere():
    return transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES, **HEADS, logit_scale=0.3, eos_token_id=1))


def granite():
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES, **HEADS, logits_scaling=3.0))


def mixtral():
    config = transformers.MixtralConfig(**SIZES, **HEADS, output_router_logits=True, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def bart():
    model = tiny("bart")
    model.final_logits_bias.normal_()
    return model


def masked():
    config = transformers.BertConfig(**SIZES, num_attention_heads=2, hidden_dropout_prob=0.0)
    return transformers.BertForMaskedLM(config)


MODELS = {
    "llama": lambda: tiny("llama"),
    "gpt2": lambda: tiny("gpt2"),
    "t5": lambda: tiny("t5"),
    "t5 untied": lambda: tiny("t5", tie_word_embeddings=False),
    "bart": bart,
    "gemma2": gemma,
    "cohere": cohere,
    "granite": granite,
    "mixtral": mixtral,
    "bert": masked,
}


@pytest.mark.parametrize("name", MODELS)
def test_models_with_every_parameter_trained(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    assert_same(model, inputs_of(name if name in ("t5", "bart") else "llama"))


@pytest.mark.parametrize("name", ["llama", "gemma2", "bart", "bert"])
def test_logits_are_there_when_they_are_used(name):
    model, inputs = MODELS[name]().eval(), inputs_of("bart" if name == "bart" else "llama")
    expected = model(**inputs).logits
    chunk_loss(model)
    outputs = model(**inputs)
    assert isinstance(outputs.logits, torch.Tensor) and outputs.logits.shape == expected.shape
    assert outputs.logits.dtype == expected.dtype and outputs.logits.requires_grad
    assert torch.equal(outputs.logits.argmax(-1), expected.argmax(-1))
    assert_close(outputs.logits[:, -1] * 2, expected[:, -1] * 2)
    assert_close(torch.softmax(outputs.logits, -1), torch.softmax(expected, -1))
    assert_close(pickle.loads(pickle.dumps(outputs.logits.detach())), expected.detach())


def test_logits_that_outputs_are_moved_or_cut_as():
    """As accelerate does with what a model puts out, and prompts with their own tokens."""
    model, inputs = tiny("llama"), inputs_of("llama")
    expected = model(**inputs).logits
    stage = chunk_loss(model)
    logits = model(**inputs).logits
    for lazy, plain in (
        (logits.to(torch.device("cpu"), non_blocking=True), expected),
        (logits.double(), expected.double()),
        (logits.narrow(1, 2, 3), expected.narrow(1, 2, 3)),
        (logits[1], expected[1]),
        (logits[:, -1], expected[:, -1]),
        (logits[..., 1:, :], expected[..., 1:, :]),
        (logits.flatten(0, 1), expected.flatten(0, 1)),
        (logits.reshape(2, 21, VOCAB), expected.reshape(2, 21, VOCAB)),
    ):
        assert type(lazy) is type(logits) and lazy._used is None
        assert lazy.shape == plain.shape and lazy.dtype == plain.dtype
        assert_close(lazy + 0, plain + 0)
    for cut in (
        lambda z: z[..., 3:5],
        lambda z: z[0, 1, 2],
        lambda z: z[:, [1, 2]],
        lambda z: z.flatten(),
        lambda z: z[None],
    ):
        assert type(cut(logits)) is torch.Tensor
        assert_close(cut(logits), cut(expected))
    assert stage.whole is None


def test_logits_take_in_place_changes():
    model, inputs = tiny("llama"), inputs_of("llama")
    expected = model(**inputs).logits.detach()
    chunk_loss(model)
    with torch.no_grad():
        logits = model(**inputs).logits
    logits.mul_(2)
    assert_close(logits + 0, expected * 2)


def test_a_loss_of_its_own_kind_gets_whole_logits():
    model, inputs = tiny("llama"), inputs_of("llama")
    model.loss_function = lambda logits, labels, **options: logits.logsumexp(-1).mean()
    assert_same(model, inputs, whole="logsumexp needs them")


def test_smoothed_and_counted_losses():
    model, inputs = tiny("llama"), inputs_of("llama")
    assert_same(model, {**inputs, "num_items_in_batch": torch.tensor(17)})

    def smoothed(logits, labels, vocab_size, **options):
        shifted = logits[..., :-1, :].contiguous()
        loss = nn.CrossEntropyLoss(label_smoothing=0.1)
        return loss(shifted.view(-1, shifted.size(-1)), labels[..., 1:].reshape(-1))

    model.loss_function = smoothed
    assert_same(model, inputs)


def test_calls_without_labels_and_generation_are_untouched():
    model, inputs = tiny("llama"), inputs_of("llama")
    expected = model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False)
    chunk_loss(model)
    inputs.pop("labels")
    assert type(model(**inputs).logits) is torch.Tensor
    assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False), expected)


def test_evaluation_without_gradients():
    model, inputs = tiny("t5"), inputs_of("t5")
    expected = model(**inputs).loss
    stage = chunk_loss(model)
    with torch.no_grad():
        assert_close(model(**inputs).loss, expected)
    assert stage.whole is None


# ------------------------------------------------------------------------------------------------------ under adapters


def adapted(arch="llama", config=None, model=None, **options):
    config = config or LoraConfig(task_type=TASKS[arch], r=2, **options)
    torch.manual_seed(0)
    model = get_peft_model(tiny(arch) if model is None else model, config).eval()
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5", "bart"])
def test_lora_below_the_head(arch):
    targets = {"llama": "all-linear", "gpt2": ["c_attn"], "t5": ["q", "v"], "bart": ["q_proj", "fc1"]}
    assert_same(adapted(arch, target_modules=targets[arch]), inputs_of(arch))


ON_HEADS = {
    "lora": lambda: LoraConfig(r=2, target_modules=["q_proj", "lm_head"]),
    "dora": lambda: LoraConfig(r=2, target_modules=["lm_head"], use_dora=True),
    "copied": lambda: LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "bank": lambda: deltatune.VBLoRAConfig(
        r=2, target_modules=["q_proj", "lm_head"], num_vectors=8, vector_length=1, topk=2
    ),
    "ia3": lambda: deltatune.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
    "tokens": lambda: deltatune.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[3, 4, 5]),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ON_HEADS)
def test_adapters_on_the_head(name, tied):
    model = tiny("llama", tie_word_embeddings=tied)
    inputs = inputs_of("llama")
    inputs["input_ids"][:, 0] = 3
    assert_same(adapted(config=ON_HEADS[name](), model=model), inputs)


def test_adapters_put_on_and_switched_after_chunk_loss():
    model, inputs = tiny("llama"), inputs_of("llama")
    base = model(**inputs).loss.detach()
    stage = chunk_loss(model)
    model = adapted(model=model, target_modules=["lm_head", "q_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    with model.disable_adapter():
        assert_close(model(**inputs).loss, base)
    losses = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        losses[name] = model(**inputs).loss
        stage.remove()
        assert_close(losses[name], model(**inputs).loss)
        stage = chunk_loss(model)
    assert not torch.allclose(losses["default"], losses["other"])
    model.merge_adapter()
    assert_close(model(**inputs).loss, losses["other"], rtol=1e-4, atol=1e-5)
    assert stage.whole is None


def test_gradients_follow_the_adapters_of_the_forward_pass():
    """The head's logits are made once more in backward, by when another choice may hold."""
    model, inputs = adapted(target_modules=["lm_head"]), inputs_of("llama")
    _, expected = loss_and_gradients(model, inputs)
    model.zero_grad()
    chunk_loss(model)
    loss = model(**inputs).loss
    with model.disable_adapter():
        loss.backward()
    for name, parameter in trained(model).items():
        assert_close(parameter.grad, expected[name], **CLOSE)


def test_logits_of_a_head_that_was_trained_since():
    model, inputs = adapted(target_modules=["lm_head"]), inputs_of("llama")
    chunk_loss(model)
    outputs = model(**inputs)
    outputs.loss.backward()
    torch.optim.SGD(trained(model).values(), lr=0.1).step()
    with pytest.raises(StateError, match=r"before optimizer.step\(\)"):
        outputs.logits.argmax(-1)


def test_rows_of_different_adapters():
    model, inputs = adapted(target_modules=["lm_head", "q_proj"]), inputs_of("llama")
    rows = ["default", "__base__"] * 3
    assert_same(model, {**inputs, "adapter_names": rows}, "rows of the batch go through the head in different ways")
    below = adapted(target_modules=["q_proj"])
    assert_same(below, {**inputs, "adapter_names": rows})


INPUTS = {
    "prompt_tuning": lambda task: deltatune.PromptTuningConfig(task_type=task, num_virtual_tokens=3),
    "p_tuning": lambda task: deltatune.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=3, encoder_hidden_size=8, encoder_dropout=0.0
    ),
    "prefix": lambda task: deltatune.PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
    "cpt": lambda task: deltatune.CPTConfig(
        task_type=task, cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4]
    ),
}


@pytest.mark.parametrize("arch", ["llama", "t5"])
@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning", "prefix"])
def test_prompts(name, arch):
    assert_same(adapted(arch, INPUTS[name](TASKS[arch])), inputs_of(arch))


def test_cpt_computes_its_loss_by_itself():
    model, inputs = adapted(config=INPUTS["cpt"]("CAUSAL_LM")).train(), inputs_of("llama")
    types = torch.full_like(inputs["input_ids"], 4)
    assert_same(model, {**inputs, "input_type_mask": types}, whole="no pass with labels has run")


def test_penalties_are_added():
    config = deltatune.AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10, init_r=4, target_r=2
    )
    model, inputs = adapted(config=config).train(), inputs_of("llama")
    assert model.penalty() > 0
    assert_same(model, inputs)


# ----------------------------------------------------------------------------------- precision, memory, other machinery


def peak_bytes(run):
    """The most that was allocated at once, by the profiler's count."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["below", "on the head"])
def test_whole_logits_are_never_there(targets):
    model = adapted(model=tiny("llama", vocab_size=4096), target_modules=targets)
    inputs, one = inputs_of("llama", 40), 40 * 7 * 4096 * 4  # bytes of the logits

    def step():
        model.zero_grad()
        model(**inputs).loss.backward()

    step()
    plain = peak_bytes(step)
    chunk_loss(model)
    assert plain > 2 * one
    assert peak_bytes(step) < one / 2


@pytest.mark.parametrize("name", ["lora", "copied"])
def test_half_precision(name):
    model = adapted(config=ON_HEADS[name](), model=tiny("llama").bfloat16())
    assert_same(model, inputs_of("llama"), rtol=5e-2, atol=5e-3)


def test_autocast():
    model, inputs = adapted(target_modules=["q_proj"]), inputs_of("llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(model, inputs, rtol=5e-2, atol=5e-3)


def test_quantised_head():
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny("llama", hidden_size=32)
    how = quantization.Int8WeightOnlyConfig(version=2)
    quantization.quantize_(model, how, filter_fn=lambda module, path: path == "lm_head")
    assert type(model.lm_head.weight) is not nn.Parameter
    assert_same(adapted(model=model, target_modules=["q_proj"]), inputs_of("llama"))


def test_gradient_checkpointing():
    model, inputs = adapted(target_modules=["q_proj", "lm_head"]).train(), inputs_of("llama")
    model.gradient_checkpointing_enable()
    assert_same(model, inputs)


def test_compiled_models_keep_their_own_loss():
    model = adapted(model=tiny("llama", num_hidden_layers=1), target_modules=["q_proj"])
    inputs = inputs_of("llama")
    expected, gradients = loss_and_gradients(model, inputs)
    chunk_loss(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found, others = loss_and_gradients(compiled, inputs)
    assert_close(found, expected, **CLOSE)
    for name, gradient in gradients.items():
        assert_close(others[f"_orig_mod.{name}"], gradient, **CLOSE)


def test_hooks_of_others_on_the_head_still_run():
    model, inputs = tiny("llama"), inputs_of("llama")
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    assert_same(model, inputs)
    before = len(seen)
    chunk_loss(model)
    model(**inputs)
    assert len(seen) > before + 1  # the row that is looked at, and every chunk


def test_copies_of_a_model():
    model, inputs = adapted(target_modules=["q_proj"]), inputs_of("llama")
    chunk_loss(model)
    expected = model(**inputs).loss
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(other(**inputs).loss, expected)
        assert chunk_loss(other) is not chunk_loss(model) and chunk_loss(other).whole is None


def test_twice_is_once_and_removing_leaves_nothing():
    model = tiny("llama")
    stage = chunk_loss(model)
    assert chunk_loss(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))) is stage
    stage.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (model, model.lm_head))
    assert type(model(**inputs_of("llama")).logits) is torch.Tensor


def test_a_failed_pass_leaves_nothing_behind():
    model, inputs = tiny("llama"), inputs_of("llama")
    stage = chunk_loss(model)
    with pytest.raises(IndexError):
        model(**{**inputs, "input_ids": inputs["input_ids"] + VOCAB})
    assert stage.local.head is None
    assert type(model.lm_head(torch.zeros(1, 2, 16))) is torch.Tensor


def test_a_model_without_a_head():
    with pytest.raises(StateError, match="LlamaModel has no head"):
        chunk_loss(tiny("llama").model)


def test_peft_models():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    assert_same(model, inputs_of("llama"))
