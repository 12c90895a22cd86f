"""Methods that are no change of a weight, with PEFT 0.21.2: files both ways, and training from the same start."""

from __future__ import annotations

import random

import pytest
import torch
from torch.testing import assert_close

import deltatune
from tests.core.tiny import TASKS, batch, tiny
from tests.peer.crossing import EXACT
from tests.peer.pairs import ATTENTION, loaded_by_peft, peft, saved_by_peft, scatter, theirs

POLY_ON = ["llama", "bert", "t5"]  # PEFT's Poly does not know transformers' Conv1D, of which GPT-2 is made


def answers(model, arch: str, **further):
    return model(**batch(arch), **further)


POOLER = r"bert\.pooler.*"


def poly_options(arch: str, seed: int) -> dict:
    draw = random.Random(f"{arch}{seed}")
    return {
        "task_type": TASKS[arch],
        "target_modules": sorted(draw.sample(ATTENTION[arch], 2)),
        "r": draw.choice([1, 2, 5]),
        "n_tasks": draw.choice([1, 2, 3]),
        "n_skills": draw.choice([1, 2, 4]),
        "n_splits": draw.choice([1, 2, 4]),
        "init_weights": draw.random() < 0.5,
        "exclude_modules": POOLER,  # whose input has no axis of tokens: PEFT raises, see below
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("arch", POLY_ON)
def test_poly_crosses_over(arch, seed, tmp_path):
    options = poly_options(arch, seed)
    last = options["n_tasks"] - 1
    tasks = torch.tensor([last, 0])
    model = theirs(arch, peft.PolyConfig(**options))
    expected = answers(model, arch, task_ids=tasks).logits
    ours = deltatune.PeftModel.from_pretrained(tiny(arch), saved_by_peft(model, tmp_path / "theirs"))
    assert_close(answers(ours, arch, task_ids=tasks).logits, expected, **EXACT)
    ours.save_pretrained(tmp_path / "again")
    back = loaded_by_peft(tiny(arch), tmp_path / "again")
    assert_close(answers(back, arch, task_ids=tasks).logits, expected, **EXACT)
    made = scatter(deltatune.get_peft_model(tiny(arch), deltatune.PolyConfig(**options)), 11)
    assert made.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    made.save_pretrained(tmp_path / "ours")
    there = loaded_by_peft(tiny(arch), tmp_path / "ours")
    assert_close(answers(there, arch, task_ids=tasks).logits, answers(made, arch, task_ids=tasks).logits, **EXACT)


def test_an_input_without_an_axis_of_tokens_makes_peft_raise_and_works_here():
    options = {"task_type": "SEQ_CLS", "target_modules": ["pooler.dense"], "r": 2, "n_tasks": 2}
    tasks = torch.tensor([1, 0])
    with pytest.raises(RuntimeError, match="batch1 must be a 3D tensor"):
        answers(theirs("bert", peft.PolyConfig(**options)), "bert", task_ids=tasks)
    ours = scatter(deltatune.get_peft_model(tiny("bert"), deltatune.PolyConfig(**options)), 3)
    assert answers(ours, "bert", task_ids=tasks).logits.shape == (2, 3)


def losses(model, arch: str, steps: int = 20) -> list[float]:
    model.train()
    torch.manual_seed(0)  # of the mixtures that are drawn
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    found = []
    for step in range(steps):
        inputs = batch(arch, rows=3, seed=step % 4)
        loss = model(**inputs, task_ids=torch.tensor([0, 1, step % 2])).loss
        found.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_poly_trains_alike_with_the_same_draws(arch, tmp_path):
    config = peft.PolyConfig(task_type=TASKS[arch], target_modules=ATTENTION[arch][:2], r=2, n_tasks=2, n_splits=2)
    model = theirs(arch, config)
    ours = deltatune.PeftModel.from_pretrained(tiny(arch), saved_by_peft(model, tmp_path), is_trainable=True)
    expected = losses(model, arch)
    assert sum(expected[-4:]) < sum(expected[:4])
    assert losses(ours, arch) == pytest.approx(expected, abs=1e-4)


def test_poly_generates_as_in_peft(tmp_path):
    config = peft.PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2, n_tasks=2)
    model = theirs("llama", config)
    ours = deltatune.PeftModel.from_pretrained(tiny("llama"), saved_by_peft(model, tmp_path))
    ids, tasks = torch.tensor([[5, 9, 12, 4], [8, 3, 3, 7]]), torch.tensor([1, 0])
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(
        ours.generate(input_ids=ids, task_ids=tasks, **settings),
        model.generate(input_ids=ids, task_ids=tasks, **settings),
    )
