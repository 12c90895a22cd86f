"""Low-rank relatives of LoRA (HiRA, LoHa, LoKr, GraLoRA, MiSS, DeLoRA) cross over, and train as PEFT's do."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import deltatune
from tests.core.tiny import TASKS, batch, logits, tiny
from tests.peer import crossing
from tests.peer.crossing import EXACT
from tests.peer.pairs import ATTENTION, EMBEDDING, loaded_by_peft, peft, saved_by_peft, scatter, theirs

CONFIGS = {
    "hira": "HiraConfig",
    "loha": "LoHaConfig",
    "lokr": "LoKrConfig",
    "gralora": "GraloraConfig",
    "miss": "MissConfig",
    "delora": "DeloraConfig",
}
SIZES: dict[str, dict[str, Any]] = {
    "hira": {"r": 4},
    "loha": {"r": 3, "alpha": 5},
    "lokr": {"r": 1, "alpha": 2},
    "gralora": {"r": 4, "alpha": 6},
    "miss": {"r": 4},
    "delora": {"r": 4, "delora_lambda": 1},
}
# PEFT's knows transformers' Conv1D, of which GPT-2 is made, only in some.
ARCHITECTURES = {
    "hira": ("llama", "bert", "t5", "gpt2"),
    "loha": ("llama", "bert", "t5"),
    "lokr": ("llama", "bert", "t5"),
    "gralora": ("llama", "bert", "t5", "gpt2"),
    "miss": ("llama", "bert", "t5"),
    "delora": ("llama", "bert", "t5"),
}
CASES = [(method, arch) for method, known in ARCHITECTURES.items() for arch in known]

quiet = pytest.mark.filterwarnings("ignore:.*match no module:deltatune.PeftWarning")


def configs(method: str, **options: Any) -> tuple[Any, Any]:
    arguments = {**SIZES[method], **options}
    return tuple(getattr(library, CONFIGS[method])(**arguments) for library in (peft, deltatune))  # type: ignore


def crosses_over(method: str, arch: str, folder: Any, **options: Any) -> None:
    their_config, our_config = configs(method, task_type=TASKS[arch], **options)
    # PEFT misses DeLoRA's norms with a warning, though it derives the same ones
    format = "peft" if method == "delora" else None
    their_model, our_model = crossing.crosses_over(their_config, our_config, arch, folder, format=format)
    assert their_model.get_nb_trainable_parameters()[0] == our_model.get_nb_trainable_parameters()[0]


def drawn(method: str, arch: str, seed: int) -> dict[str, Any]:
    """Random options that fit an architecture."""
    draw = random.Random(f"{method}{arch}{seed}")
    names = sorted(draw.sample(ATTENTION[arch], draw.randint(1, 3)))
    return {"target_modules": names, **OPTIONS[method](draw, names)}


def hira_options(draw: random.Random, names: list[str]) -> dict[str, Any]:
    return {
        "r": draw.choice([1, 2, 5]),
        "init_weights": draw.choice([True, False, "gaussian"]),
        "exclude_modules": draw.choice([None, r".*\.0\..*"]),
    }


def loha_options(draw: random.Random, names: list[str]) -> dict[str, Any]:
    return {
        "r": draw.choice([1, 2, 5]),
        "alpha": draw.choice([1, 8, 20]),
        "rank_pattern": draw.choice([{}, {names[0]: 3}]),
        "alpha_pattern": draw.choice([{}, {rf".*\.{names[-1]}": 7}]),
        "rank_dropout": draw.choice([0.0, 0.3]),
        "init_weights": draw.choice([True, False]),
    }


def lokr_options(draw: random.Random, names: list[str]) -> dict[str, Any]:
    return {
        "r": draw.choice([1, 2, 5, 1000]),
        "alpha": draw.choice([1, 8, 20]),
        "rank_pattern": draw.choice([{}, {names[0]: 2}]),
        "alpha_pattern": draw.choice([{}, {rf".*\.{names[-1]}": 7}]),
        "decompose_both": draw.choice([True, False]),
        "decompose_factor": draw.choice([-1, 2, 5, 8]),
        "init_weights": draw.choice([True, False, "lycoris"]),
    }


def gralora_options(draw: random.Random, names: list[str]) -> dict[str, Any]:
    k = draw.choice([1, 2, 4])
    return {
        "gralora_k": k,
        "r": k * draw.choice([1, 2]),
        "hybrid_r": draw.choice([0, 1, 3]),
        "alpha": draw.choice([1, 8, 20]),
        "init_weights": draw.choice([True, False]),
        "layers_to_transform": draw.choice([None, [1], 0]),
    }


def miss_options(draw: random.Random, names: list[str]) -> dict[str, Any]:
    kind = draw.choice([True, False, "bat", "mini"])
    return {
        "init_weights": kind,
        "r": draw.choice([2, 8] if kind == "bat" else [1, 5, 7, 16]),
        "mini_r": draw.choice([1, 2, 8]),
        "layers_to_transform": draw.choice([None, [1], 0]),
    }


def delora_options(draw: random.Random, names: list[str]) -> dict[str, Any]:
    return {
        "r": draw.choice([1, 2, 5]),
        "delora_lambda": draw.choice([1, 3]),
        "rank_pattern": draw.choice([{}, {names[0]: 3}]),
        "lambda_pattern": draw.choice([{}, {rf".*\.{names[-1]}": 2}]),
        "init_weights": draw.choice([True, False]),
        "exclude_modules": draw.choice([None, r".*\.0\..*"]),
    }


OPTIONS = {
    "hira": hira_options,
    "loha": loha_options,
    "lokr": lokr_options,
    "gralora": gralora_options,
    "miss": miss_options,
    "delora": delora_options,
}


@quiet
@pytest.mark.parametrize("method,arch", CASES)
def test_every_linear_layer(method, arch, tmp_path):
    crosses_over(method, arch, tmp_path, target_modules="all-linear")


@quiet
@pytest.mark.parametrize("method", CONFIGS)
def test_usual_targets(method, tmp_path):
    crosses_over(method, "t5", tmp_path)


@quiet
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", CONFIGS)
def test_random_options(method, seed, tmp_path):
    arch = ("llama", "bert", "t5", "bert")[seed]
    crosses_over(method, arch, tmp_path, **drawn(method, arch, seed))


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_training(method, arch, tmp_path):
    their_config, _ = configs(method, task_type=TASKS[arch], target_modules=ATTENTION[arch][:3])
    crossing.trains_alike(their_config, arch, tmp_path)


@pytest.mark.parametrize("options", [{"init_weights": "bat"}, {"init_weights": "mini", "mini_r": 2}], ids=str)
def test_training_of_other_kinds_of_miss(options, tmp_path):
    their_config, _ = configs("miss", task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], **options)
    crossing.trains_alike(their_config, "llama", tmp_path)


@quiet
@pytest.mark.parametrize("arch", ["gpt2", "llama", "bert"])
def test_hira_on_embeddings(arch, tmp_path):
    crosses_over("hira", arch, tmp_path, target_modules=[EMBEDDING[arch], ATTENTION[arch][0]])


def test_pefts_hira_passes_over_its_rank_pattern(tmp_path):
    """So its file says one rank and holds another: it is refused here, and loads once the pattern is taken out."""
    their_config, _ = configs("hira", target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    model = theirs("llama", their_config)
    assert {p.shape[0] for name, p in model.named_parameters() if "hira_A" in name} == {4}
    folder = saved_by_peft(model, tmp_path)
    with pytest.raises(deltatune.PeftError, match=r"v_proj.hira_A has shape \(4, 16\), the model expects \(2, 16\)"):
        deltatune.PeftModel.from_pretrained(tiny("llama"), folder)
    told = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**told, "rank_pattern": {}}))
    ours = deltatune.PeftModel.from_pretrained(tiny("llama"), folder)
    assert_close(logits(ours, batch("llama")), logits(model, batch("llama")), **EXACT)


def test_peft_derives_the_norms_that_our_files_of_delora_leave_out(tmp_path):
    _, our_config = configs("delora", target_modules=["q_proj", "down_proj"])
    ours = scatter(deltatune.get_peft_model(tiny("llama"), our_config), 4)
    ours.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="Found missing adapter keys.*delora_w_norm"):
        model = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    assert_close(logits(model, batch("llama")), logits(ours, batch("llama")), **EXACT)


class Convolutions(nn.Module):
    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, kernel, stride=2, padding=1)
        self.second = nn.Conv2d(8, 6, kernel, bias=False)
        self.line = nn.Conv1d(6, 8, kernel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(torch.tanh(self.first(x)))
        return self.line(torch.tanh(x.flatten(2)))


def convolutions(kernel: int) -> nn.Module:
    torch.manual_seed(0)
    return Convolutions(kernel).eval()


@pytest.mark.parametrize("kernel", [1, 2])
@pytest.mark.parametrize(
    "method,options",
    [
        ("hira", {}),
        ("loha", {}),
        ("loha", {"use_effective_conv2d": True}),
        ("lokr", {}),
        ("lokr", {"r": 4}),  # full matrices
        ("lokr", {"decompose_factor": 1}),
        ("lokr", {"decompose_factor": 1, "use_effective_conv2d": True}),
        ("lokr", {"decompose_factor": 8, "decompose_both": True, "r": 2}),
    ],
    ids=str,
)
def test_convolutions(method, options, kernel, tmp_path):
    their_config, our_config = configs(method, target_modules=["first", "second", "line"], **options)
    x = torch.randn(2, 4, 9, 9)
    model = scatter(peft.get_peft_model(convolutions(kernel), their_config), 3)
    ours = deltatune.PeftModel.from_pretrained(convolutions(kernel), saved_by_peft(model, tmp_path / "theirs"))
    assert not torch.allclose(model(x), convolutions(kernel)(x), atol=1e-3)
    assert_close(ours(x), model(x), **EXACT)
    made = scatter(deltatune.get_peft_model(convolutions(kernel), our_config), 4)
    made.save_pretrained(tmp_path / "ours")
    assert_close(loaded_by_peft(convolutions(kernel), tmp_path / "ours")(x), made(x), **EXACT)
