"""Packed rows learn what rows alone learn, and models that mix them up are refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from deltatune import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from deltatune.data.collate import Collator
from deltatune.data.pack import Pack, packed
from deltatune.data.prepare import Corpus, prepare
from deltatune.data.read import table_of
from deltatune.errors import ConfigError
from deltatune.train import TrainSettings, train
from deltatune.train.packing import check_packing
from tests.train import toys

CPU = torch.device("cpu")
SETTINGS = TrainSettings(task="causal", packing=True)
SIZES: dict[str, Any] = {"vocab_size": 32, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    made = prepare(table_of(toys.pairs(12)), None, None, "causal")
    return made.encode(toys.tokenizer(), max_length=32, max_target_length=16).packed()


def model_of(kind: str, **options: Any) -> Any:
    import transformers as hf

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **SIZES}
    wide = {**small, "intermediate_size": 32, "num_key_value_heads": 2, **options}
    made: dict[str, Any] = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**wide)),
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**wide, sliding_window=4)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **SIZES)),
        "mamba": lambda: hf.MambaForCausalLM(
            hf.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, **SIZES)
        ),
        "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=16, n_layer=2, n_head=2, **SIZES)),
    }
    return made[kind]().eval()


def adapted(model: Any, method: str) -> Any:
    task: Any = TaskType.CAUSAL_LM
    configs: dict[str, Any] = {
        "lora": lambda: LoraConfig(task_type=task, r=4, target_modules="all-linear"),
        "prefix": lambda: PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
        "prefix of PEFT's layout": lambda: PrefixTuningConfig(task_type=task, num_virtual_tokens=3, layout="peft"),
        "prompt": lambda: PromptTuningConfig(task_type=task, num_virtual_tokens=3),
    }
    torch.manual_seed(1)
    made = get_peft_model(model, configs[method]()).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)  # off its start
    return made


def losses(model: Any, rows: list[Any]) -> torch.Tensor:
    """The loss of each target, in the order of rows, in float64; gradients are left on the parameters."""
    model.zero_grad()
    batch = Collator(0, "causal")(rows)
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    each = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    told = each[labels[:, 1:].flatten() != -100]
    told.mean().backward()
    return told.detach()


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *itertools.product(["llama", "mistral", "gpt2"], ["lora", "prefix"]),
        *itertools.product(["llama", "gpt2"], ["prefix of PEFT's layout"]),
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_have_the_losses_and_gradients_of_rows_alone(corpus, kind, method, attention):
    model = model_of(kind)
    model.set_attn_implementation(attention)
    model = adapted(model, method)
    packs = corpus.train.features
    # in the order of the packs
    alone = [row for pack in packs for row in _apart(pack)]
    one = losses(model, alone)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    two = losses(model, packs)
    assert torch.allclose(one, two, atol=1e-5, rtol=0), float((one - two).abs().max())
    assert gradients
    for name, gradient in gradients.items():
        found = model.get_parameter(name).grad
        assert torch.allclose(gradient, found, atol=1e-5), (name, float((gradient - found).abs().max()))
    check_packing(model, corpus, SETTINGS, CPU)


def _apart(pack: Pack) -> list[Any]:
    from deltatune.data.features import Features

    made, start = [], 0
    for size in pack.sizes:
        stop = start + size
        labels = pack.labels[start:stop]
        made.append(Features(pack.input_ids[start:stop], labels, sum(label != -100 for label in labels)))
        start = stop
    return made


def test_rows_that_see_each_other_have_other_losses(corpus):
    """The same comparison, of positions that run on: it notices."""
    model = adapted(model_of("llama"), "lora")
    packs = corpus.train.features
    one = losses(model, [row for pack in packs for row in _apart(pack)])
    joined = [_joined(pack) for pack in packs]
    assert (one - losses(model, joined)).abs().max() > 1e-3


def _joined(pack: Pack) -> Pack:
    return Pack(pack.input_ids, pack.labels, pack.targets, sizes=(len(pack.input_ids),))


@pytest.mark.parametrize(
    ("kind", "method", "why"),
    [
        ("mamba", "lora", "a packed row (sees the tokens of the row before it|is not possible)"),
        ("bloom", "lora", "a packed row (sees the tokens of the row before it|is not possible)"),
        ("llama", "prompt", "a packed row is not possible .*a prompt stands before the first sequence only"),
        (
            "mistral",
            "prefix of PEFT's layout",
            "a packed row gets other outputs than alone",
        ),  # it slides out of windows
    ],
)
def test_what_cannot_keep_rows_apart_is_refused(corpus, kind, method, why):
    model = adapted(model_of(kind), method)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(ConfigError, match=why) as caught:
        check_packing(model, corpus, SETTINGS, CPU)
    assert caught.value.field == "packing"
    assert torch.equal(state, torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_model_that_reads_no_positions_is_refused(corpus):
    class Deaf(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model_of("llama")

        def forward(self, input_ids, position_ids=None, attention_mask=None, use_cache=None):
            return self.inner(input_ids)

    with pytest.raises(ConfigError, match="sees the tokens of the row before it"):
        check_packing(Deaf(), corpus, SETTINGS, CPU)


def test_a_packed_run_trains_each_row_once_an_epoch_and_resumes_to_the_bit(settings, tmp_path):
    changes = {"packing": True, "max_length": 32, "max_steps": -1, "num_train_epochs": 2, "save_steps": 1}
    changes["save_total_limit"] = 9
    made = settings("causal", per_device_train_batch_size=2, **changes)
    result = train(made)
    rows = packed(_features(made), 32)
    assert result.metrics["train_rows"] == 24
    assert result.steps == 2 * -(-len(rows) // 2)
    again = made.model_copy(update={"resume_from_checkpoint": str(tmp_path / "out/checkpoint-3"),
                                    "output_dir": str(tmp_path / "again")})  # fmt: skip
    train(again)
    one, two = (tmp_path / name / "adapter_model.safetensors" for name in ("out", "again"))
    assert one.read_bytes() == two.read_bytes()


def _features(settings: TrainSettings) -> list[Any]:
    from deltatune.train.corpus import load_corpus

    corpus = load_corpus(settings).encode(toys.tokenizer(), max_length=32, max_target_length=128)
    return corpus.train.features


def test_a_run_that_cannot_be_packed_is_refused_before_its_first_step(settings, tmp_path):
    with pytest.raises(ConfigError, match="packing=True"):
        train(settings("causal", packing=True, method="prompt_tuning", num_virtual_tokens=3, max_length=32))
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    with pytest.raises(ConfigError, match="only causal models can be packed"):
        settings("seq2seq", packing=True)
