"""The six tasks with P-tuning v2's prefix: labels, padding and token types mean what they mean without one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from deltatune import PeftModel, PrefixTuningConfig, get_peft_model
from tests.prompts.models import BERT, GPT, T5

SETTINGS = {"bert": BERT, "gpt2": GPT, "t5": T5}
AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
HEADS = {  # the modules that a task trains whole, by their names in the bare model
    ("bert", "SEQ_CLS"): "classifier", ("gpt2", "SEQ_CLS"): "score", ("t5", "SEQ_CLS"): "classification_head",
    ("bert", "TOKEN_CLS"): "classifier", ("gpt2", "TOKEN_CLS"): "classifier", ("t5", "TOKEN_CLS"): "classifier",
    **{(name, "QUESTION_ANS"): "qa_outputs" for name in ("bert", "gpt2", "t5")},
}  # fmt: skip
CASES = [
    *HEADS,
    *(("bert", "FEATURE_EXTRACTION"), ("gpt2", "FEATURE_EXTRACTION"), ("t5", "FEATURE_EXTRACTION")),
    *(("gpt2", "CAUSAL_LM"), ("bert", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")),
]
cases = pytest.mark.parametrize(("name", "task"), CASES)
READ = 8  # tokens of the long row


def base(name: str, task: str) -> Any:
    settings = {**SETTINGS[name], "num_labels": 2 if task == "QUESTION_ANS" else 3}
    if name != "t5":
        settings["initializer_range"] = 0.3  # at which attention and token types matter
    if name == "bert" and task == "CAUSAL_LM":
        settings["is_decoder"] = True
    config = transformers.AutoConfig.for_model(name, **settings)
    torch.manual_seed(0)
    return getattr(transformers, AUTO[task]).from_config(config).eval()


def tuned(name: str, task: str, **options: Any) -> PeftModel:
    config = PrefixTuningConfig.p_tuning_v2(task, **{"num_virtual_tokens": 5, **options})
    torch.manual_seed(1)
    return get_peft_model(base(name, task), config).eval()


def inputs(name: str, task: str, rows: slice = slice(0, 2), length: int = READ) -> dict[str, torch.Tensor]:
    """Two rows of eight and five tokens, padded on the right; a sentence ends with T5's end token."""
    ids = torch.tensor([[9, 33, 12, 40, 8, 21, 7, 2], [50, 11, 6, 31, 2, 0, 0, 0]])
    found = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if name == "bert":
        found["token_type_ids"] = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0, 0]])
    found = {key: value[rows, :length] for key, value in found.items()}
    if name == "t5" and task in ("SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"):
        found["decoder_input_ids"] = torch.tensor([[0, 14, 3], [0, 22, 17]])[rows]
    return found


def labels(task: str) -> dict[str, torch.Tensor]:
    if task == "SEQ_CLS":
        return {"labels": torch.tensor([2, 0])}
    if task == "TOKEN_CLS":
        return {"labels": torch.tensor([[0, 1, 2, 0, 1, 2, 0, -100], [2, 1, 0, 2, -100, -100, -100, -100]])}
    if task == "QUESTION_ANS":
        return {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([7, 4])}
    if task == "CAUSAL_LM":
        return {"labels": torch.tensor([[9, 33, 12, 40, 8, 21, 7, 2], [50, 11, 6, 31, 2, -100, -100, -100]])}
    return {"labels": torch.tensor([[14, 3, 2], [22, 17, 2]])} if task == "SEQ_2_SEQ_LM" else {}


def answers(output: Any) -> list[torch.Tensor]:
    """What a head says, one tensor per output of the task."""
    if "start_logits" in output:
        return [output.start_logits, output.end_logits]
    return [output.logits if "logits" in output else output.last_hidden_state]


def loss_by_hand(task: str, output: Any) -> torch.Tensor:
    wanted = list(labels(task).values())
    found = answers(output)
    if task == "CAUSAL_LM":
        found, wanted = [found[0][:, :-1]], [wanted[0][:, 1:]]
    pairs = [cross_entropy(one.flatten(0, -2) if one.ndim == 3 else one, want.flatten())
             for one, want in zip(found, wanted)]  # fmt: skip
    return torch.stack(pairs).mean()


@cases
def test_outputs_have_the_length_of_the_input_and_the_loss_is_theirs(name, task):
    model = tuned(name, task)
    with torch.no_grad():
        output = model(**inputs(name, task), **labels(task))
    found = answers(output)[0]
    if task not in ("SEQ_CLS", "SEQ_2_SEQ_LM") and not (name == "t5" and task == "FEATURE_EXTRACTION"):
        assert found.shape[:2] == (2, READ)
    if labels(task):
        torch.testing.assert_close(output.loss, loss_by_hand(task, output))


@cases
def test_padding_changes_nothing(name, task):
    model = tuned(name, task)
    for parameter in model.prompt_encoder.parameters():
        assert parameter.abs().max() > 1  # the prefix has a say
    with torch.no_grad():
        together = answers(model(**inputs(name, task)))
        alone = answers(model(**inputs(name, task, slice(1, 2), 5)))
    for one, other in zip(together, alone):
        one = one[1:] if one.shape[1:] == other.shape[1:] else one[1:, :5]
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_token_types_count(task):
    model, given = tuned("bert", task), inputs("bert", task)
    without = {key: value for key, value in given.items() if key != "token_type_ids"}
    zeros = {**given, "token_type_ids": torch.zeros_like(given["input_ids"])}
    with torch.no_grad():
        with_types, plain, with_zeros = (answers(model(**one))[0] for one in (given, without, zeros))
    assert torch.equal(plain, with_zeros) and (plain - with_types).abs().max() > 1e-4


@cases
def test_prefix_and_head_train_and_nothing_else(name, task):
    model = tuned(name, task)
    head = HEADS.get((name, task))
    before = {key: value.clone() for key, value in base(name, task).named_parameters()}
    trainable = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("prompt_encoder" in key or (head and f"{head}.modules_to_save" in key) for key in trainable)
    assert any("prompt_encoder" in key for key in trainable) and (not head or any(head in key for key in trainable))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(6):
        output = model.train()(**inputs(name, task), **labels(task))
        loss = output.loss if labels(task) else answers(output)[0][..., 0].square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = dict(model.unload().named_parameters())
    assert all(torch.equal(after[key], value) for key, value in before.items())


@cases
def test_prefix_and_head_come_back_bit_for_bit(name, task, tmp_path):
    model = tuned(name, task)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    head = HEADS.get((name, task))
    assert {key.split(".")[1] for key in keys if key.startswith("base_model.")} == ({head} if head else set())
    loaded = PeftModel.from_pretrained(base(name, task), tmp_path)
    assert type(loaded) is type(model)
    with torch.no_grad():
        for one, other in zip(answers(loaded(**inputs(name, task))), answers(model(**inputs(name, task)))):
            assert torch.equal(one, other)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_files_of_peft_hold_the_same_answers(name, task, tmp_path):
    """Both ways, with PEFT's layout: its numbers, and the head beside them."""
    peft = pytest.importorskip("peft", reason="peft, the peer that this test compares with, is not installed")
    given = inputs(name, task)
    if task == "QUESTION_ANS":
        given.pop("token_type_ids", None)  # which PEFT drops in this task, without a word
    real = given["attention_mask"].bool()

    def same(one: Any, other: Any) -> None:
        with torch.no_grad():
            for ours, theirs in zip(answers(one(**given)), answers(other(**given))):
                whole = task == "SEQ_CLS"
                expected = theirs if whole else theirs[real]
                torch.testing.assert_close(ours if whole else ours[real], expected, atol=1e-5, rtol=1e-5)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=5)
        other = peft.get_peft_model(base(name, task), config).eval()
        with torch.no_grad():
            for parameter in other.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        other.save_pretrained(tmp_path / "theirs")
        model = PeftModel.from_pretrained(base(name, task), tmp_path / "theirs")
        same(model, other)
        model.save_pretrained(tmp_path / "ours")
        same(peft.PeftModel.from_pretrained(base(name, task), tmp_path / "ours").eval(), model)


def test_the_preset_is_what_the_paper_does():
    config = PrefixTuningConfig.p_tuning_v2("TOKEN_CLS")
    assert (config.num_virtual_tokens, config.sites, config.prefix_projection) == (100, "all", False)
    assert PrefixTuningConfig.p_tuning_v2("SEQ_CLS").num_virtual_tokens == 20
    assert PrefixTuningConfig.p_tuning_v2("SEQ_CLS", num_virtual_tokens=8, sites="self").sites == "self"
    kinds = {site.kind for site in tuned("t5", "SEQ_2_SEQ_LM").prefixes["default"].sites}
    assert kinds == {"self", "encoder", "cross"}
