"""X-LoRA beside PEFT's: the same weights and logits, PEFT reads what we write. What PEFT writes is not whole."""

from __future__ import annotations

import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.testing import assert_close

import deltatune
from deltatune.errors import MismatchError, PeftWarning
from tests.core.tiny import batch, logits, tiny
from tests.peer.crossing import EXACT, losses
from tests.peer.pairs import TASKS, peft, saved_by_peft


def opt(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    quiet = {"dropout": 0.0, "max_position_embeddings": 32, "word_embed_proj_dim": 16}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**{**sizes, **quiet, **changes})).eval()


def base_of(arch: str, **changes: Any) -> Any:
    return opt(**changes) if arch == "opt" else tiny(arch, **changes)


TARGETS = {
    "llama": [["q_proj", "v_proj"], ["q_proj", "down_proj"], ["embed_tokens", "o_proj"]],
    "opt": [["q_proj", "k_proj"], ["q_proj", "out_proj"], ["v_proj", "embed_tokens"]],  # PEFT cannot do fc1, fc2
    "bert": [["query"], ["query", "value"]],
    "gpt2": [["c_attn"], ["c_attn", "c_fc"]],
}


def experts(arch: str, folder: Path, count: int = 3) -> dict[str, str]:
    found = {}
    for index, names in enumerate(TARGETS[arch][:count]):
        torch.manual_seed(index)
        config = peft.LoraConfig(r=2 + index, lora_alpha=6, target_modules=names, init_lora_weights=False)
        model = peft.get_peft_model(base_of(arch), config)
        found[str(index)] = str(saved_by_peft(model, folder / f"expert{index}"))
    return found


def theirs(arch: str, adapters: dict[str, str], **options: Any) -> Any:
    """PEFT refuses a base with use_cache, and does not check whether `hidden_size` is right."""
    base = base_of(arch, use_cache=False)
    arguments = {"task_type": TASKS.get(arch, "CAUSAL_LM"), "hidden_size": 16, "adapters": adapters, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.XLoraConfig(**arguments))
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.base_model.internal_xlora_classifier.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model.eval()


def pair(arch: str, folder: Path, count: int = 3, **options: Any) -> tuple[Any, Any]:
    """PEFT's model and ours with the same classifier."""
    options, adapters = {"xlora_size": 8, **options}, experts(arch, folder, count)
    model = theirs(arch, adapters, **options)
    config = deltatune.XLoraConfig(task_type=TASKS.get(arch, "CAUSAL_LM"), adapters=adapters, **options)
    ours = deltatune.get_peft_model(base_of(arch), config)
    state = {key: value for key, value in model.state_dict().items() if "internal_xlora_classifier" in key}
    result = deltatune.set_peft_model_state_dict(ours, state)
    assert not result.missing_keys and not result.unexpected_keys
    return model, ours.eval()


def drawn(seed: int) -> dict[str, Any]:
    draw = random.Random(f"xlora{seed}")
    options: dict[str, Any] = {"xlora_depth": draw.choice([1, 2, 3]), "layerwise_scalings": draw.random() < 0.5}
    options["enable_softmax"] = draw.random() < 0.6
    options["softmax_temperature"] = draw.choice([1.0, 0.3])
    options["xlora_dropout_p"] = draw.choice([0.0, 0.2])
    options["global_scaling_weight"] = draw.choice([1.0, 0.7])
    options["scaling_pass_value"] = draw.choice([0.0, 0.4])
    if draw.random() < 0.5:
        options |= {"top_k_lora": draw.choice([1, 2]), "enable_softmax_topk": draw.random() < 0.5}
    return options


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_weights_and_logits_agree(arch, seed, tmp_path):
    model, ours = pair(arch, tmp_path, **drawn(seed))
    inputs = batch("llama")
    with torch.no_grad():
        expected, found = logits(model, inputs), logits(ours, inputs)
        assert not torch.allclose(found, logits(base_of(arch), inputs), atol=1e-2)
    assert_close(ours.get_latest_scalings(), model.get_latest_scalings(), **EXACT)
    assert_close(found, expected, **EXACT)
    assert ours.get_nb_trainable_parameters()[0] == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("depth", [1, 3])
def test_peft_reads_what_we_write(depth, tmp_path):
    _, ours = pair("llama", tmp_path, xlora_depth=depth, layerwise_scalings=True)
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        back = peft.PeftModel.from_pretrained(tiny("llama", use_cache=False), tmp_path / "ours").eval()
    inputs = batch("llama")
    with torch.no_grad():
        assert_close(logits(back, inputs), logits(ours, inputs), **EXACT)
        again = deltatune.PeftModel.from_pretrained(tiny("llama"), tmp_path / "ours")
        assert torch.equal(logits(again, inputs), logits(ours, inputs))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_classifier_that_peft_saves_in_pieces_is_put_together(depth, tmp_path):
    """PEFT leaves out of a file what is called like another adapter: `layers.0`, for expert "0" is one. PEFT's loading
    then keeps what a fresh classifier draws there."""
    model, _ = pair("llama", tmp_path, xlora_depth=depth)
    folder = saved_by_peft(model, tmp_path / "theirs")
    assert not any("layers.0." in key for key in load_file(folder / "adapter_model.safetensors"))
    inputs = batch("llama")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = logits(model, inputs)
        read = deltatune.PeftModel.from_pretrained(tiny("llama"), folder)
        assert_close(logits(read, inputs), expected, **EXACT)
        back = peft.PeftModel.from_pretrained(tiny("llama", use_cache=False), folder).eval()
        assert not torch.allclose(logits(back, inputs), expected, atol=1e-3), "PEFT reads its own file now"
        read.save_pretrained(tmp_path / "ours")
        back = peft.PeftModel.from_pretrained(tiny("llama", use_cache=False), tmp_path / "ours").eval()
        assert_close(logits(back, inputs), expected, **EXACT)


def test_experts_that_peft_has_trained_are_not_whole_in_its_folder(tmp_path):
    model, _ = pair("llama", tmp_path, use_trainable_adapters=True)
    folder = saved_by_peft(model, tmp_path / "theirs")
    with pytest.warns(PeftWarning, match="PEFT saves trained experts in part only"):
        deltatune.PeftModel.from_pretrained(tiny("llama"), folder)


def test_a_file_without_a_classifier_is_refused_and_the_base_left_as_it_was(tmp_path):
    model, _ = pair("llama", tmp_path)
    folder = saved_by_peft(model, tmp_path / "theirs")
    for part in "012":
        shutil.rmtree(folder / part)
    base = tiny("llama")
    with pytest.raises(MismatchError, match="no tensor of its classifier"):
        deltatune.PeftModel.from_pretrained(base, folder)
    assert not any("adapters" in name for name, _ in base.named_modules())
    inputs = batch("llama")
    with torch.no_grad():
        assert torch.equal(logits(base, inputs), logits(tiny("llama"), inputs))


@pytest.mark.parametrize("trainable", [False, True])
def test_twenty_steps(trainable, tmp_path):
    options = {"xlora_depth": 2, "xlora_dropout_p": 0.0, "layerwise_scalings": True}
    model, ours = pair("llama", tmp_path, use_trainable_adapters=trainable, **options)
    assert ours.get_nb_trainable_parameters()[0] == model.get_nb_trainable_parameters()[0]
    expected = losses(model, "llama", 20)
    assert expected[-4] < expected[0]
    assert losses(ours, "llama", 20) == pytest.approx(expected, abs=1e-4)


def test_answers_agree(tmp_path):
    """PEFT generates without a cache."""
    model, ours = pair("llama", tmp_path, xlora_depth=2)
    prompt = {key: value for key, value in batch("llama").items() if key != "labels"}
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt = {key: value.flip(1) for key, value in prompt.items()}  # padding belongs to the left
    expected = model.generate(**prompt, **settings)
    assert torch.equal(ours.generate(**prompt, **settings), expected)
    assert torch.equal(ours.generate(**prompt, **settings, use_cache=False), expected)


# What PEFT does with adapters that are called otherwise, and with models whose inner one is not called "model".
IN_PEFT = [
    ("llama", lambda names: {"math": names["0"], "code": names["1"]}, KeyError),
    ("bert", lambda names: names, ValueError),
    ("gpt2", lambda names: names, ValueError),
]


@pytest.mark.parametrize(("arch", "renamed", "error"), IN_PEFT, ids=["names", "bert", "gpt2"])
def test_what_peft_cannot_make(arch, renamed, error, tmp_path):
    adapters = renamed(experts(arch, tmp_path, 2))
    with pytest.raises(error):
        logits(theirs(arch, adapters), batch(arch))
    ours = deltatune.get_peft_model(
        base_of(arch), deltatune.XLoraConfig(task_type=TASKS[arch], adapters=adapters)
    ).eval()
    assert not torch.allclose(logits(ours, batch(arch)), logits(base_of(arch), batch(arch)), atol=1e-3)
