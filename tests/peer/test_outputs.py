"""Methods that are no change of a weight, with PEFT 0.21.2: files both ways, and training from the same start."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import deltatune
from tests.core.tiny import TASKS, batch, tiny
from tests.peer.crossing import EXACT
from tests.peer.pairs import ATTENTION, loaded_by_peft, peft, saved_by_peft, scatter, theirs

POLY_ON = ["llama", "bert", "t5"]  # PEFT's Poly does not know transformers' Conv1D, of which GPT-2 is made


def answers(model, arch: str, **further):
    return model(**batch(arch), **further)


# other architectures have no pooler that could be left out, and are told so
pytestmark = pytest.mark.filterwarnings("ignore:exclude_modules. the pattern")
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


# ---------------------------------------------------------------------------------------------------------------- Lily


def row(arch: str, seed: int = 1) -> dict:
    """PEFT's mixture is one for the whole batch, padding included; of one row without padding it is the row's."""
    return {key: value[1:2] for key, value in batch(arch, seed=seed).items()}


def lily_options(arch: str, seed: int) -> dict:
    draw = random.Random(f"{arch}{seed}")
    # PEFT takes any name's ending for the kind of a layer, in the order of a set: "o" may be "wo"
    names = [name for name in ATTENTION[arch] if name not in ("wo", "wi", "o")]
    options = {"target_modules": sorted(draw.sample(names, 2)), "r": draw.choice([1, 2, 5]), "exclude_modules": POOLER}
    options |= {"stride_A": draw.choice([1, 2, 3]), "num_B": draw.choice([2, 3]), "scaling": draw.choice([1.0, 0.5])}
    return {"task_type": TASKS[arch], "init_weights": draw.random() < 0.5, **options}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("arch", ["llama", "bert", "t5"])
def test_lily_crosses_over(arch, seed, tmp_path):
    options, inputs = lily_options(arch, seed), row(arch)
    model = theirs(arch, peft.LilyConfig(**options))
    expected = model(**inputs).logits
    ours = deltatune.PeftModel.from_pretrained(tiny(arch), saved_by_peft(model, tmp_path / "theirs"))
    assert_close(ours(**inputs).logits, expected, **EXACT)
    assert ours.get_nb_trainable_parameters()[1] == model.get_nb_trainable_parameters()[1]
    ours.save_pretrained(tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tensors that PEFT repeats and ours do not: it shares them all the same
        back = peft.PeftModel.from_pretrained(tiny(arch), tmp_path / "again").eval()
        assert_close(back(**inputs).logits, expected, **EXACT)
        made = scatter(deltatune.get_peft_model(tiny(arch), deltatune.LilyConfig(**options)), 11)
        made.save_pretrained(tmp_path / "ours")
        there = peft.PeftModel.from_pretrained(tiny(arch), tmp_path / "ours").eval()
    assert_close(there(**inputs).logits, made(**inputs).logits, **EXACT)


def test_the_file_of_lily_is_smaller_by_what_peft_repeats(tmp_path):
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "o_proj"], "r": 8, "stride_A": 3}
    model = theirs("llama", peft.LilyConfig(**options))
    saved_by_peft(model, tmp_path / "theirs")
    deltatune.PeftModel.from_pretrained(tiny("llama"), tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    sizes = [len(load_file(tmp_path / who / "adapter_model.safetensors")) for who in ("theirs", "ours")]
    assert sizes == [3 * 6, 2 + 2 + 6]


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_lily_trains_alike_on_one_row(arch, tmp_path):
    config = peft.LilyConfig(task_type=TASKS[arch], target_modules=ATTENTION[arch][:2], r=4, stride_A=2)
    model = theirs(arch, config)
    ours = deltatune.PeftModel.from_pretrained(tiny(arch), saved_by_peft(model, tmp_path), is_trainable=True)
    assert ours.get_nb_trainable_parameters()[0] == model.get_nb_trainable_parameters()[0]

    def run(model):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        found = []
        for step in range(20):
            loss = model(**row(arch, step % 4)).loss
            found.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return found

    expected = run(model)
    assert sum(expected[-4:]) < sum(expected[:4])
    assert run(ours) == pytest.approx(expected, abs=1e-4)


def test_in_a_batch_peft_mixes_rows_and_we_do_not():
    model = theirs("llama", peft.LilyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    ours = deltatune.get_peft_model(
        tiny("llama"), deltatune.LilyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deltatune.set_peft_model_state_dict(ours.eval(), peft.get_peft_model_state_dict(model))
    ids = batch("llama")["input_ids"]
    for found, same in ((model, False), (ours, True)):
        together = found(input_ids=ids).logits[1]
        assert torch.allclose(together, found(input_ids=ids[1:]).logits[0], atol=1e-5) is same
