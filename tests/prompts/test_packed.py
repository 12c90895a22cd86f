"""Several sequences packed into one row, told apart by restarting positions or by a mask of blocks."""

from __future__ import annotations

import pytest
import torch

from deltatune import PrefixTuningConfig
from deltatune.prompts import attention
from tests.prompts.models import bare, prefixed, redraw

LENGTHS = (7, 9)
POSITIONS = torch.tensor([[*range(LENGTHS[0]), *range(LENGTHS[1])]])
CAUSAL = torch.block_diag(*(torch.ones(n, n) for n in LENGTHS)).tril().bool()[None, None]


def pieces(rows: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 64, (rows, length), generator=generator) for length in LENGTHS]


def forms(implementation: str) -> list[dict[str, torch.Tensor]]:
    """Ways to say where sequences end. Transformers' eager attention takes masks to add only, not of True and False."""
    added = torch.zeros(CAUSAL.shape).masked_fill(~CAUSAL, torch.finfo(torch.float32).min)
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    varlen = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)}
    masks = [{"attention_mask": added}] + ([{"attention_mask": CAUSAL}] if implementation == "sdpa" else [])
    return [{}, varlen, *masks]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("implementation", "backend"), [("sdpa", "auto"), ("sdpa", "merge"), ("sdpa", "concat"), ("eager", "auto")]
)
@pytest.mark.parametrize("name", ["gpt2", "llama", "latent"])
def test_packed_sequences_answer_as_each_alone(name, implementation, backend, train):
    model, parts = prefixed(name, bare(name, implementation)).train(train), pieces()
    with torch.no_grad(), attention.using(backend):
        apart = torch.cat([model(input_ids=part).logits for part in parts], dim=1)
        for form in forms(implementation):
            packed = {"input_ids": torch.cat(parts, dim=1), "position_ids": POSITIONS, "use_cache": False, **form}
            torch.testing.assert_close(model(**packed).logits, apart, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_packed_sequences_in_windows(name):
    model, parts = prefixed(name), pieces()
    with torch.no_grad():
        apart = torch.cat([model(input_ids=part).logits for part in parts], dim=1)
        packed = model(input_ids=torch.cat(parts, dim=1), position_ids=POSITIONS, use_cache=False).logits
    torch.testing.assert_close(packed, apart, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
def test_packed_rows_with_prefixes_of_their_own(name):
    model, rows = prefixed(name), ["default", "long"]
    model.add_adapter("long", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7))
    redraw(model)
    parts = pieces(rows=2)
    with torch.no_grad():
        apart = torch.cat([model(input_ids=part, adapter_names=rows).logits for part in parts], dim=1)
        packed = model(
            input_ids=torch.cat(parts, dim=1), position_ids=POSITIONS.expand(2, -1), use_cache=False, adapter_names=rows
        ).logits
    torch.testing.assert_close(packed, apart, atol=2e-5, rtol=1e-5)


def test_the_gradient_of_a_packed_batch_is_that_of_its_sequences():
    model, parts = prefixed("llama").train(), pieces()

    def gradient(*passes: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        model.zero_grad()
        sum(model(**each, use_cache=False).logits.square().sum() for each in passes).backward()
        return [parameter.grad.clone() for parameter in model.prompt_encoder.parameters()]

    packed = gradient({"input_ids": torch.cat(parts, dim=1), "position_ids": POSITIONS})
    torch.testing.assert_close(packed, gradient(*({"input_ids": part} for part in parts)), atol=1e-3, rtol=1e-4)
