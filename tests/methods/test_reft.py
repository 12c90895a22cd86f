"""LoReFT against arXiv 2404.03592, equation (2): Phi(h) = h + R^T (W h + b - R h), at some prompt tokens."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import LoraConfig, PeftModel, PromptTuningConfig, ReftConfig, get_peft_model
from deltatune.errors import ConfigError, StateError
from tests.core.tiny import TASKS, batch, logits, tiny
from tests.laws.examples import adapters, move


def adapted(layer: nn.Module, **options):
    torch.manual_seed(0)
    config = ReftConfig(target_modules=["layer"], **{"r": 2, **options})
    wrapper = get_peft_model(nn.ModuleDict({"layer": layer}).double(), config).get_base_model()["layer"]
    part = wrapper.adapters["default"]
    for parameter in part.parameters():
        nn.init.normal_(parameter)
    return wrapper, part


def phi(part, h: torch.Tensor) -> torch.Tensor:
    """The equation for one vector, with an R from a library's own decomposition."""
    Q, triangle = torch.linalg.qr(part.reft_R.double().T)
    R = (Q * triangle.diagonal().sign()).T.to(h)
    W, b = part.reft_W.weight, part.reft_W.bias
    return h + R.T @ (W @ h + b - R @ h)


@pytest.mark.parametrize(
    "first,last,edited",
    [(2, 1, {0, 1, 5}), (0, 2, {4, 5}), (3, 0, {0, 1, 2}), (9, 0, set(range(6))), (None, 0, set(range(6)))],
)
def test_chosen_tokens_are_edited_and_no_others(first, last, edited):
    wrapper, part = adapted(nn.Linear(7, 5), first_n=first, last_n=last)
    x = torch.randn(3, 6, 7, dtype=torch.float64)
    h, out = wrapper.base_layer(x), wrapper(x)
    for row in range(3):
        for token in range(6):
            expected = phi(part, h[row, token]) if token in edited else h[row, token]
            assert_close(out[row, token], expected)


@pytest.mark.parametrize("r", [1, 3, 4])
def test_r_has_orthonormal_rows_whatever_training_makes_of_it(r):
    wrapper, part = adapted(nn.Linear(7, 5), r=r)
    optimizer = torch.optim.AdamW(part.parameters(), lr=0.1)
    start = part.R.detach().clone()
    for _ in range(5):
        wrapper(torch.randn(2, 3, 7, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_close(part.R @ part.R.T, torch.eye(r, dtype=torch.float64))
    assert not torch.allclose(part.R, start, atol=1e-2)
    before = part.R.detach().clone()
    with torch.no_grad():
        part.reft_R.mul_(3)
    assert_close(part.R, before)  # the length of what is trained does not matter


def test_the_edit_stays_in_the_subspace_and_is_all_that_is_there_of_it():
    """R Phi(h) = W h + b: within the subspace h is replaced; outside of it nothing changes."""
    wrapper, part = adapted(nn.Linear(7, 5))
    x = torch.randn(1, 3, 7, dtype=torch.float64)
    h, out, R = wrapper.base_layer(x), wrapper(x), part.R
    assert_close(out @ R.T, h @ part.reft_W.weight.T + part.reft_W.bias)
    rest = torch.eye(5, dtype=torch.float64) - R.T @ R
    assert_close(out @ rest, h @ rest)


def test_counts_and_the_start_of_the_papers_code():
    model = get_peft_model(nn.Sequential(nn.Linear(7, 16)), ReftConfig(target_modules=["0"]))
    part = model.get_base_model()[0].adapters["default"]
    assert model.get_nb_trainable_parameters()[0] == 2 * 4 * 16 + 4
    assert_close(part.reft_R @ part.reft_R.T, torch.eye(4))
    assert (
        part.reft_W.weight.abs().max() <= 1 / 4 and part.reft_W.bias.abs().max() <= 1 / 4
    )  # as nn.Linear: 1 / sqrt(16)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="last_n=0"):
        ReftConfig(first_n=0, last_n=0)
    with pytest.raises(ConfigError, match="first_n=-1"):
        ReftConfig(first_n=-1)
    with pytest.raises(ConfigError, match=r"r=6 orthonormal rows do not fit in the 5 outputs"):
        adapted(nn.Linear(7, 5), r=6)


# ------------------------------------------------------------------------------------------------ the prompt of a model


def edited(arch: str = "llama", seed: int = 3, **options):
    config = ReftConfig(task_type=TASKS[arch], **{"r": 2, "first_n": 1, "last_n": 2, **options})
    model = get_peft_model(tiny(arch), config).eval()
    torch.manual_seed(seed)
    move(model, 0.5)
    return model


def by_hand(model: PeftModel, arch: str, places: list[tuple[int, int]]) -> nn.Module:
    """The bare model with a hook on each of its layers that edits (row, token) by the equation."""
    bare = tiny(arch)
    for path in model.base_model.targeted_module_names:
        part = model.get_base_model().get_submodule(path).adapters["default"]

        def hook(module, args, output, part=part):
            h = (output[0] if isinstance(output, tuple) else output).clone()
            for row, token in places:
                h[row, token] = phi(part, h[row, token])
            return (h, *output[1:]) if isinstance(output, tuple) else h

        bare.get_submodule(path).register_forward_hook(hook)
    return bare


LAYERS = {
    "llama": {f"model.layers.{i}" for i in range(3)},
    "gpt2": {f"transformer.h.{i}" for i in range(2)},
    "bert": {f"bert.encoder.layer.{i}" for i in range(2)},
    "t5": {f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(2)},
    "bart": {f"model.{side}.layers.{i}" for side in ("encoder", "decoder") for i in range(2)},
}


@pytest.mark.parametrize("arch", LAYERS)
def test_without_targets_all_transformer_layers_are_edited(arch, tmp_path):
    model, inputs = edited(arch), batch(arch)
    assert set(model.base_model.targeted_module_names) == LAYERS[arch]
    model(**inputs).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(arch), tmp_path), inputs), logits(model, inputs))
    listed = next(iter(LAYERS[arch])).split(".")[-2]
    chosen = edited(arch, layers_to_transform=[1], target_modules=[listed])
    assert {path.rpartition(".")[2] for path in chosen.base_model.targeted_module_names} == {"1"}


PADDED = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7, [0, 0, 1, 1, 1, 1, 1]])  # on the right, none, on the left


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_padding_is_no_part_of_the_prompt(arch):
    model = edited(arch)
    inputs = {"input_ids": batch(arch, rows=3)["input_ids"], "attention_mask": PADDED}
    places = [(0, 0), (0, 3), (0, 4), (1, 0), (1, 5), (1, 6), (2, 2), (2, 5), (2, 6)]
    expected = logits(by_hand(model, arch, places), inputs)
    assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_what_labels_count_is_no_part_of_the_prompt():
    model = edited()
    inputs = {"input_ids": batch("llama", rows=3)["input_ids"], "attention_mask": PADDED}
    labels = inputs["input_ids"].masked_fill(PADDED == 0, -100)
    labels[0, :3], labels[1, :5], labels[2] = -100, -100, labels[2]  # the last row is an answer from its first token on
    places = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 3), (1, 4), (2, 2), (2, 5), (2, 6)]
    out = model(**inputs, labels=labels)
    assert_close(out.logits, logits(by_hand(model, "llama", places), inputs), rtol=1e-4, atol=1e-5)
    prompt = torch.zeros_like(PADDED)
    prompt[0, :3] = prompt[1, :5] = prompt[2, 2:] = 1
    assert_close(model(**inputs, prompt_mask=prompt).logits, out.logits)  # said instead of found out


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"do_sample": False, "num_return_sequences": 1}], ids=str)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5", "bart"])
def test_generation_edits_the_prompt_with_a_cache_and_without(arch, settings):
    model, inputs = edited(arch), {"input_ids": batch(arch, rows=2)["input_ids"], "attention_mask": PADDED[1:]}
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, **settings}
    with_cache, without = (model.generate(**inputs, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(with_cache, without)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**inputs, **settings), with_cache)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_the_next_token_is_that_of_the_edited_prompt(arch):
    """Step by step, each from the whole sequence: only the prompt is edited, however long the answer is."""
    model, ids = edited(arch), batch(arch, rows=1)["input_ids"]
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(input_ids=ids, **settings)
    places, bare = [(0, 0), (0, 5), (0, 6)], tiny(arch)
    if arch == "llama":
        bare, sequence = by_hand(model, arch, places), ids
        for _ in range(4):
            sequence = torch.cat([sequence, bare(input_ids=sequence).logits[:, -1:].argmax(-1)], dim=1)
    else:
        sequence = torch.zeros(1, 1, dtype=torch.long)
        for path in model.base_model.targeted_module_names:
            part = model.get_base_model().get_submodule(path).adapters["default"]
            chosen = places if path.startswith("encoder") else [(0, 0)]

            def hook(module, args, output, part=part, chosen=chosen):
                h = output[0].clone()
                for row, token in chosen:
                    h[row, token] = phi(part, h[row, token])
                return (h, *output[1:])

            bare.get_submodule(path).register_forward_hook(hook)
        for _ in range(4):
            step = bare(input_ids=ids, decoder_input_ids=sequence, use_cache=False).logits
            sequence = torch.cat([sequence, step[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, sequence)


def test_a_prompt_that_comes_in_parts_is_one_prompt():
    model, ids = edited(), batch("llama", rows=2)["input_ids"]
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    whole = model.generate(input_ids=ids, **settings)
    assert torch.equal(model.generate(input_ids=ids, prefill_chunk_size=3, **settings), whole)
    first = model(input_ids=ids[:, :4], prompt_mask=torch.ones(2, 7), use_cache=True)  # by hand, said beforehand
    second = model(input_ids=ids[:, 4:], past_key_values=first.past_key_values, prompt_mask=torch.ones(2, 7))
    assert_close(second.logits, model(input_ids=ids).logits[:, 4:], rtol=1e-4, atol=1e-5)
    later = model(input_ids=ids[:, :1], past_key_values=second.past_key_values).logits  # and no token behind it
    plain = by_hand(model, "llama", [(row, token) for row in range(2) for token in (0, 5, 6)])
    assert_close(later[:, 0], plain(input_ids=torch.cat([ids, ids[:, :1]], 1)).logits[:, -1], rtol=1e-4, atol=1e-5)


def test_rows_of_a_batch_have_their_own_prompts_and_adapters():
    model = edited()
    model.add_adapter("other", ReftConfig(task_type="CAUSAL_LM", r=1, first_n=2, last_n=0))
    move(model, 0.5, "other")
    model.add_adapter("lora", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    move(model, 0.5, "lora")
    ids, names = batch("llama", rows=3)["input_ids"], ["other", "lora", "default"]
    inputs = {"input_ids": ids, "attention_mask": PADDED}
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "pad_token_id": 0}
    mixed = model(**inputs, adapter_names=names).logits
    answers = model.generate(**inputs, adapter_names=names, **settings)
    for row, name in enumerate(names):
        part = {key: value[row : row + 1] for key, value in inputs.items()}
        assert_close(model(**part, adapter_names=[name]).logits, mixed[row : row + 1], rtol=1e-4, atol=1e-5)
        assert torch.equal(model.generate(**part, adapter_names=[name], **settings), answers[row : row + 1])


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_checkpointing_gives_the_same_gradients(arch):
    found = []
    for checkpointing in (False, True):
        model = edited(arch).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch(arch), use_cache=False).loss.backward()
        found.append([p.grad for p in adapters(model)])
    for one, other in zip(*found):
        assert_close(one, other)


def test_hooks_come_and_go_with_the_adapters():
    model = edited("t5")
    base = model.get_base_model()
    assert len(base._forward_pre_hooks) == len(base.encoder._forward_pre_hooks) == 1
    model.add_adapter("lora", LoraConfig(task_type="SEQ_2_SEQ_LM", r=2))
    model.set_adapter("lora")
    model.delete_adapter("default")
    assert not base._forward_pre_hooks and not base._forward_hooks and not base.encoder._forward_pre_hooks
    assert not edited().unload()._forward_pre_hooks


def test_a_pass_of_other_tokens_than_the_layer_sees_is_refused_in_words():
    model = edited()
    model.add_adapter("prompt", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.set_adapter(["default", "prompt"])
    with pytest.raises(StateError, match=r"edits tokens of the prompt.* in a pass of 7 tokens"):
        model(input_ids=batch("llama")["input_ids"])
