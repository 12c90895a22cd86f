"""Methods that follow a schedule: PEFT's `update_and_allocate` called on both sides gives the same training."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import deltatune
from tests.core.tiny import TASKS, batch, logits, tiny
from tests.peer import crossing
from tests.peer.crossing import EXACT, crosses_over
from tests.peer.pairs import ATTENTION, loaded_by_peft, peft, saved_by_peft, scatter, theirs

ARCHITECTURES = ("gpt2", "llama", "t5", "bert")


def unlabelled(arch: str, **options: Any) -> dict[str, torch.Tensor]:
    """PEFT's AdaLoRA loaded for inference raises AttributeError (`trainable_adapter_name`) where there is a loss."""
    inputs = batch(arch, **options)
    labels = inputs.pop("labels")
    return {**inputs, "decoder_input_ids": labels} if arch == "t5" else inputs


@pytest.fixture(autouse=True)
def no_labels(monkeypatch):
    monkeypatch.setattr(crossing, "batch", unlabelled)


def configs(arch: str, **options: Any) -> tuple[Any, Any]:
    arguments = {"task_type": TASKS[arch], "init_r": 4, "target_r": 2, "total_step": 24, **options}
    return peft.AdaLoraConfig(**arguments), deltatune.AdaLoraConfig(**arguments)


def drawn(arch: str, seed: int) -> dict[str, Any]:
    draw = random.Random(f"adalora{arch}{seed}")
    return {
        "target_modules": sorted(draw.sample(ATTENTION[arch], draw.randint(1, 3))),
        "init_r": draw.choice([2, 5, 8]),
        "lora_alpha": draw.choice([1, 7, 16]),
        "init_lora_weights": draw.random() < 0.7,
        "orth_reg_weight": draw.choice([0.0, 0.5]),
        "exclude_modules": r".*\.0\..*" if draw.random() < 0.3 else None,
    }


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_usual_targets(arch, tmp_path):
    target_modules = {"t5": ["q", "v"]}.get(arch)  # PEFT's usual ones of AdaLoRA are more than of LoRA
    crosses_over(*configs(arch, target_modules=target_modules), arch, tmp_path)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_random_options(arch, seed, tmp_path):
    torch.set_default_dtype(torch.float64)  # random factors are large, and so is what single precision rounds
    try:
        their_model, our_model = crosses_over(*configs(arch, **drawn(arch, seed)), arch, tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert their_model.get_nb_trainable_parameters()[0] == our_model.get_nb_trainable_parameters()[0]


def trained(model: Any, arch: str, steps: int, begin: int = 1, kind: Any = torch.optim.AdamW) -> list[float]:
    """A loop as PEFT's documentation has it."""
    model.train()
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    found = []
    for step in range(begin, begin + steps):
        loss = model(**batch(arch, rows=3, seed=step % 4)).loss
        found.append(loss.item())
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return found


def started(arch: str, folder: Path, **options: Any) -> tuple[Any, Any]:
    """PEFT's model and ours from the same start, which is not the zero of E."""
    model = theirs(arch, configs(arch, **options)[0])
    return model, deltatune.PeftModel.from_pretrained(tiny(arch), saved_by_peft(model, folder), is_trainable=True)


def patterns(*models: Any) -> list[dict[str, list[bool]]]:
    return [
        {key.replace(".default", ""): kept for key, kept in (model.peft_config["default"].rank_pattern or {}).items()}
        for model in models
    ]


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {}),
        ("llama", {"tinit": 4, "tfinal": 6, "deltaT": 3}),
        ("llama", {"target_r": 1, "beta1": 0.5, "beta2": 0.95, "orth_reg_weight": 0.1, "tfinal": 10}),
        ("bert", {"tinit": 2, "tfinal": 4, "orth_reg_weight": 0.0, "lora_alpha": 32}),
        ("t5", {"tfinal": 4, "deltaT": 2, "target_modules": ["q", "v"]}),
        ("gpt2", {"tinit": 1, "tfinal": 1, "init_r": 6}),
    ],
    ids=str,
)
def test_training_with_the_schedule_is_pefts(arch, options, tmp_path):
    model, ours = started(arch, tmp_path / "start", **options)
    assert ours.get_nb_trainable_parameters()[0] == model.get_nb_trainable_parameters()[0]
    total = 24
    expected = trained(model, arch, total)
    assert trained(ours, arch, total) == pytest.approx(expected, abs=1e-4)
    there, here = patterns(model, ours)
    assert here == there and sum(map(sum, here.values())) < sum(map(len, here.values()))

    inputs = unlabelled(arch)
    with torch.no_grad():
        assert_close(logits(ours.eval(), inputs), logits(model.eval(), inputs), rtol=1e-3, atol=1e-3)
    saved_by_peft(model, tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    from safetensors.torch import load_file

    left, right = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert {key: value.shape for key, value in left.items()} == {key: value.shape for key, value in right.items()}
    written = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")]
    assert written[0]["rank_pattern"] == written[1]["rank_pattern"]

    # what either has pruned and resized, the other reads
    read = deltatune.PeftModel.from_pretrained(tiny(arch), tmp_path / "theirs")
    assert_close(logits(read, inputs), logits(model, inputs), **EXACT)
    read.save_pretrained(tmp_path / "again")
    for folder, source in ((tmp_path / "again", model), (tmp_path / "ours", ours)):
        assert_close(logits(loaded_by_peft(tiny(arch), folder), inputs), logits(source, inputs), **EXACT)
        mine = deltatune.PeftModel.from_pretrained(tiny(arch), folder)
        assert_close(logits(mine, inputs), logits(source, inputs), **EXACT)
        assert_close(logits(mine.merge_and_unload(), inputs), logits(source, inputs), **EXACT)


def test_sensitivities_and_every_mask_on_the_way_are_pefts(tmp_path):
    model, ours = started("llama", tmp_path, tinit=3, tfinal=6, deltaT=2)
    for step in range(1, 25):
        for side in (model, ours):
            trained(side, "llama", 1, begin=step, kind=torch.optim.SGD)
        E = [
            torch.cat([p.flatten() for n, p in side.named_parameters() if "lora_E" in n]) != 0 for side in (model, ours)
        ]
        assert torch.equal(E[0], E[1]), step
        if step < 18:
            allocator, mine = model.base_model.rankallocator, ours.base_model.schedules["default"].sensitivity
            for name, value in allocator.exp_avg_ipt.items():
                if "ranknum" in name:
                    continue
                key = name.replace(".default", "")
                assert_close(mine.mean[key], value, rtol=1e-4, atol=1e-8)
                assert_close(mine.spread[key], allocator.exp_avg_unc[name], rtol=1e-3, atol=1e-8)


def test_a_file_from_the_middle_of_the_schedule_is_the_model_as_it_is(tmp_path):
    """PEFT writes those ranks that the last allocation left, and what has grown since then is lost from its file."""
    model, ours = started("llama", tmp_path / "start", deltaT=5)
    trained(model, "llama", 7)
    trained(ours, "llama", 7)
    inputs = unlabelled("llama")
    ours.eval().save_pretrained(tmp_path / "ours")
    for read in (
        deltatune.PeftModel.from_pretrained(tiny("llama"), tmp_path / "ours"),
        loaded_by_peft(tiny("llama"), tmp_path / "ours"),
    ):
        assert_close(logits(read, inputs), logits(ours, inputs), **EXACT)
    before = logits(model.eval(), inputs)
    cut = loaded_by_peft(tiny("llama"), saved_by_peft(copy.deepcopy(model), tmp_path / "theirs"))
    assert not torch.allclose(logits(cut, inputs), before, atol=1e-5), "PEFT's file has become whole"
    read = deltatune.PeftModel.from_pretrained(tiny("llama"), tmp_path / "theirs")
    assert_close(logits(read, inputs), logits(cut, inputs), **EXACT)


def test_a_layer_whose_ranks_are_all_gone(tmp_path):
    model, _ = started("llama", tmp_path / "start")
    names = [n for n, _ in model.base_model.model.named_parameters() if "lora_E" in n]
    gone = {name: [index != 0] * 4 for index, name in enumerate(names)}
    model.base_model.rankallocator.mask_using_rank_pattern(model.base_model.model, gone)
    model.peft_config["default"].rank_pattern = gone
    inputs = unlabelled("llama")
    read = deltatune.PeftModel.from_pretrained(tiny("llama"), saved_by_peft(model, tmp_path / "theirs"))
    assert_close(logits(read, inputs), logits(model, inputs), **EXACT)
    read.save_pretrained(tmp_path / "ours")
    assert_close(logits(loaded_by_peft(tiny("llama"), tmp_path / "ours"), inputs), logits(model, inputs), **EXACT)


# What PEFT does at an allocation in which nothing is to be pruned, or before the first gradient.
IN_PEFT = [
    ({"target_r": 4, "init_r": 4}, RuntimeError, "selected number k out of range"),
    ({"target_r": 8, "init_r": 4}, RuntimeError, "out of range"),
    ({"total_step": 1}, KeyError, "lora_"),
]


@pytest.mark.filterwarnings("ignore:.*target_r=8 is more:deltatune.PeftWarning")
@pytest.mark.parametrize(("options", "error", "named"), IN_PEFT, ids=str)
def test_what_peft_cannot_allocate(options, error, named, tmp_path):
    model = theirs("llama", configs("llama", **options)[0])
    with pytest.raises(error, match=named):
        trained(model, "llama", 1)
    ours = deltatune.PeftModel.from_pretrained(tiny("llama"), saved_by_peft(model, tmp_path), is_trainable=True)
    trained(ours, "llama", 1)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 6, 2, dilation=2, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_convolutions(tmp_path):
    """PEFT's AdaLoRA knows Conv2d with zero padding and without groups."""

    def base():
        torch.manual_seed(0)
        return Convolutions().eval()

    options = {"target_modules": ["first", "second"], "init_r": 3, "total_step": 9}
    x = torch.randn(2, 4, 9, 9)
    model = scatter(peft.get_peft_model(base(), peft.AdaLoraConfig(**options)), 3)
    ours = deltatune.PeftModel.from_pretrained(base(), saved_by_peft(model, tmp_path / "theirs"))
    assert_close(ours(x), model(x), **EXACT)
    made = scatter(deltatune.get_peft_model(base(), deltatune.AdaLoraConfig(**{**options, "target_r": 2})), 4)
    made.save_pretrained(tmp_path / "ours")
    assert_close(loaded_by_peft(base(), tmp_path / "ours")(x), made(x), **EXACT)


def adamss(arch: str, folder: Path, extra: int, **options: Any) -> tuple[Any, Any]:
    """PEFT's model and ours from the same start. In a step that drops, PEFT keeps one too few: it is told one more."""
    names = {"llama": ["q_proj", "down_proj"], "bert": ["query", "value"]}[arch]
    plan = {"use_asa": True, "init_warmup": 2, "final_warmup": 12, "mask_interval": 12, "asa_target_subspaces": 5}
    arguments = {"task_type": TASKS[arch], "r": 7, "num_subspaces": 3, "target_modules": names, **plan, **options}
    told = {**arguments, "asa_target_subspaces": arguments["asa_target_subspaces"] + extra}
    torch.manual_seed(3)
    model = scatter(peft.get_peft_model(tiny(arch), peft.AdamssConfig(**told)), 3)
    ours = deltatune.PeftModel.from_pretrained(
        tiny(arch), saved_by_peft(model, folder), is_trainable=True, config=deltatune.AdamssConfig(**arguments)
    )
    return model, ours


def active(model: Any) -> list[str]:
    """Names of the factors that train, the same on both sides."""
    found = [n for n, p in model.named_parameters() if p.requires_grad and "adamss_" in n]
    return sorted(
        n.replace(".adapters.default", "").replace("_A.default", "_A").replace("_B.default", "_B") for n in found
    )


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {}),
        ("llama", {"asa_target_subspaces": 1, "subspace_rank": 2, "asa_importance_beta": 0.6}),
        ("bert", {"asa_uncertainty_beta": 0.5, "init_warmup": 8}),
    ],
    ids=str,
)
def test_training_with_allocation_of_subspaces_is_pefts(arch, options, tmp_path):
    model, ours = adamss(arch, tmp_path, 1, **options)
    expected = trained(model, arch, 22)
    assert trained(ours, arch, 22) == pytest.approx(expected, abs=1e-4)
    assert active(ours) == active(model)
    assert len(active(ours)) == 2 * options.get("asa_target_subspaces", 5)


def test_several_allocations_rank_subspaces_as_peft_does(tmp_path):
    """In step 10 both keep int(5 + 13 / 8) = int(6 + 12 / 8) - 1 = 6 of 18; in step 20 PEFT, told 6, drops none."""
    model, ours = adamss("llama", tmp_path, 1, mask_interval=10, init_warmup=0, final_warmup=20)
    counts = []
    for step in range(1, 24):
        sides = [trained(side, "llama", 1, begin=step, kind=torch.optim.SGD) for side in (model, ours)]
        assert step > 20 or sides[1] == pytest.approx(sides[0], abs=1e-4)
        assert step >= 20 or active(ours) == active(model), step
        assert set(active(ours)) <= set(active(model))
        counts.append(len(active(ours)) // 2)
    assert counts == [18] * 9 + [6] * 10 + [5] * 4 and len(active(model)) == 12
