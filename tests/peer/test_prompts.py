"""Prompts cross over: PEFT 0.21.2's files give the same logits of the real tokens here, and ours the same there."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close

import deltatune
from tests.core.tiny import TASKS, VOCAB, batch, tiny
from tests.peer.pairs import loaded_by_peft, peft, saved_by_peft, scatter

EXACT = {"rtol": 1e-5, "atol": 1e-5}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "p-mlp": ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 10}),
    "p-lstm": ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_reparameterization_type": "LSTM"}),
    "multitask": ("MultitaskPromptTuningConfig", {"num_virtual_tokens": 3, "num_tasks": 3, "num_ranks": 2}),
    "cpt": (
        "CPTConfig",
        {
            "cpt_token_ids": [5, 6, 7, 8, 9, 10, 11, 12],
            "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 7, 8],
            "opt_weighted_loss_type": "decay",
            "opt_loss_decay_factor": 0.8,
            "opt_projection_epsilon": 8.0,  # for embeddings of width 2048; here they are of 16
            "opt_projection_format_epsilon": 4.0,
        },
    ),
}
ARCHITECTURES = ("gpt2", "llama", "bert", "t5", "bert-tokens")
PAIRS = [(m, a) for m in METHODS for a in ARCHITECTURES if m != "cpt" or a in ("gpt2", "llama")]


def base(arch: str) -> Any:
    if arch != "bert-tokens":
        return tiny(arch)
    torch.manual_seed(0)
    return transformers.BertForTokenClassification(tiny("bert").config).eval()


def task(arch: str) -> str:
    return "TOKEN_CLS" if arch == "bert-tokens" else TASKS[arch]


def configs(method: str, arch: str, **options: Any) -> tuple[Any, Any]:
    name, settings = METHODS[method]
    given = {"task_type": task(arch), **settings, **options}
    return getattr(peft, name)(**given), getattr(deltatune, name)(**given)


def theirs(method: str, arch: str, seed: int = 3, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = peft.get_peft_model(base(arch), configs(method, arch, **options)[0])
    return scatter(model, seed)


def inputs(method: str, arch: str, seed: int = 1, labels: bool = False) -> dict[str, torch.Tensor]:
    found = batch("bert" if arch == "bert-tokens" else arch, seed=seed)
    given = found.pop("labels")
    if arch == "bert-tokens":
        given = found["input_ids"] % 3
    if arch == "t5":
        found["decoder_input_ids"] = given
    if labels:
        found["labels"] = given
        found.pop("decoder_input_ids", None)
    if method == "multitask":
        found["task_ids"] = torch.tensor([2, 0])
    return found


def real(logits: torch.Tensor, count: int) -> torch.Tensor:
    """PEFT's logits have the virtual tokens in front."""
    return logits[:, -count:] if logits.ndim == 3 else logits


def their_logits(model: Any, method: str, arch: str) -> torch.Tensor:
    given = inputs(method, arch)
    if arch == "t5" and method == "multitask":  # there PEFT wants the embedded targets
        given["decoder_inputs_embeds"] = model.get_base_model().shared(given.pop("decoder_input_ids"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = model(**given).logits
    return real(logits, 5 if arch == "t5" else 7)


def our_logits(model: Any, method: str, arch: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(method, arch)).logits


@pytest.mark.parametrize(("method", "arch"), PAIRS)
def test_files_cross_over(method, arch, tmp_path):
    model = theirs(method, arch)
    expected = their_logits(model, method, arch)
    folder = saved_by_peft(model, tmp_path / "theirs")
    ours = deltatune.PeftModel.from_pretrained(base(arch), folder)
    assert_close(our_logits(ours, method, arch), expected, **EXACT)
    with ours.disable_adapter():
        assert (our_logits(ours, method, arch) - expected).abs().max() > 1e-2, "the prompt does nothing here"

    ours.save_pretrained(tmp_path / "again")
    assert_close(their_logits(loaded_by_peft(base(arch), tmp_path / "again"), method, arch), expected, **EXACT)

    torch.manual_seed(5)
    made = scatter(deltatune.get_peft_model(base(arch), configs(method, arch)[1]), 11)
    made.save_pretrained(tmp_path / "ours")
    found = their_logits(loaded_by_peft(base(arch), tmp_path / "ours"), method, arch)
    assert_close(found, our_logits(made, method, arch), **EXACT)


@pytest.mark.parametrize(("method", "arch"), [(m, a) for m, a in PAIRS if a in ("gpt2", "llama", "t5")])
def test_training_side_by_side(method, arch):
    """Equal tensors, eight steps, equal losses; the encoder of P-tuning is copied, for PEFT's files lack it."""
    model = theirs(method, arch, num_transformer_submodules=2 if arch == "t5" else 1).train()
    options = {} if method == "cpt" else {"num_transformer_submodules": 2 if arch == "t5" else 1}
    ours = deltatune.get_peft_model(base(arch), configs(method, arch, **options)[1]).train()
    ours.prompt_encoder["default"].load_state_dict(model.prompt_encoder["default"].state_dict())
    assert ours.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    expected = losses(model, method, arch)
    assert expected[6] < expected[2] < expected[0]  # the same batch
    assert losses(ours, method, arch) == pytest.approx(expected, abs=1e-4)


def losses(model: Any, method: str, arch: str) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    found = []
    for step in range(8):
        given = inputs(method, arch, seed=step % 2, labels=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = model(**given).loss
        found.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("init", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_a_target_task_starts_where_peft_starts_it(init, tmp_path):
    source = theirs("multitask", "llama")
    file = saved_by_peft(source, tmp_path) / "adapter_model.safetensors"
    options = {"prompt_tuning_init": init, "prompt_tuning_init_state_dict_path": str(file), "num_tasks": 1}
    options["prompt_tuning_init_task"] = 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = peft.get_peft_model(base("llama"), configs("multitask", "llama", **options)[0])
    ours = deltatune.get_peft_model(base("llama"), configs("multitask", "llama", **options)[1])
    wanted = dict(expected.prompt_encoder["default"].named_parameters())
    for name, parameter in ours.prompt_encoder["default"].named_parameters():
        if init != "ONLY_SOURCE_SHARED" or name == "embedding.weight":
            assert torch.equal(parameter, wanted[name])


def test_words_of_the_vocabulary_are_all_there():
    assert max(METHODS["cpt"][1]["cpt_token_ids"]) < VOCAB


def test_public_names_are_pefts():
    names = (
        "PromptTuningConfig PromptTuningInit PromptEmbedding PromptEncoderConfig PromptEncoder CPTConfig CPTEmbedding"
    )
    more = "PromptEncoderReparameterizationType MultitaskPromptTuningConfig MultitaskPromptTuningInit"
    for name in f"{names} {more}".split():
        assert hasattr(peft, name) and hasattr(deltatune, name)
