"""LoRA's starts cross over between PEFT 0.21.2 and us, train alike, and begin alike; where PEFT cannot, its error."""

from __future__ import annotations

import dataclasses
import random
import sys
import types
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import deltatune
import deltatune.lora
from deltatune.errors import ConfigError
from tests.core.tiny import TASKS, batch, logits, tiny
from tests.peer.crossing import EXACT, crosses_over, trains_alike
from tests.peer.pairs import ATTENTION, EMBEDDING, loaded_by_peft, peft, saved_by_peft, scatter, theirs

# PEFT takes the weight of transformers' Conv1D, of which GPT-2 is made, the wrong way round in OLoRA.
RELOADED = {
    "pissa": ("llama", "bert", "t5", "gpt2"),
    "olora": ("llama", "bert", "t5"),
    "orthogonal": ("llama", "bert", "t5", "gpt2"),
    "mica": ("llama", "bert", "t5", "gpt2"),
    "eva": ("llama", "bert", "gpt2"),
}
CASES = [(init, arch) for init, known in RELOADED.items() for arch in known]
quiet = pytest.mark.filterwarnings("ignore:.*match no module:deltatune.PeftWarning")
patterns = pytest.mark.filterwarnings("ignore:.*_pattern:deltatune.PeftWarning")


def configs(init: str, arch: str, **options: Any) -> tuple[Any, Any]:
    arguments = {"task_type": TASKS[arch], "init_lora_weights": init, "r": 4, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.LoraConfig(**arguments), deltatune.LoraConfig(**arguments)


def drawn(init: str, arch: str, seed: int) -> dict[str, Any]:
    """Random options that fit an architecture."""
    draw = random.Random(f"{init}{arch}{seed}")
    names = sorted(draw.sample(ATTENTION[arch], draw.randint(1, 3)))
    return {
        "target_modules": names,
        "r": draw.choice([2, 4, 6]),
        "lora_alpha": draw.choice([1, 7, 16]),
        "use_rslora": draw.choice([True, False]),
        "rank_pattern": draw.choice([{}, {names[0]: 2}]),
        "alpha_pattern": draw.choice([{}, {rf".*\.{names[-1]}": 5}]),
        "layers_to_transform": draw.choice([None, [1], 0]),
    }


@quiet
@patterns
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("init,arch", CASES)
def test_random_options_cross_over_both_ways(init, arch, seed, tmp_path):
    options = drawn(init, arch, seed)
    their_model, our_model = crosses_over(*configs(init, arch, **options), arch, tmp_path)
    assert their_model.get_nb_trainable_parameters()[0] == our_model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_embedding_that_peft_starts_plainly_is_read_so_and_ours_is_written_for_everyone(init, tmp_path):
    their_config, our_config = configs(init, "llama", target_modules=[EMBEDDING["llama"], "q_proj"])
    crosses_over(their_config, our_config, "llama", tmp_path)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("init", ["pissa_niter_4", "olora", "corda", "lora_ga"])
def test_peft_reads_what_we_write_of_starts_that_it_cannot_restore(init, arch, tmp_path):
    names = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}[arch]
    config = deltatune.LoraConfig(
        r=3, lora_alpha=5, target_modules=names, init_lora_weights=init, task_type=TASKS[arch]
    )
    base = tiny(arch)
    deltatune.lora.prepare(base, config, [batch(arch, seed=seed) for seed in range(3)])
    model = scatter(deltatune.get_peft_model(base, config), 3)
    model.save_pretrained(tmp_path)
    torch.manual_seed(77)
    assert_close(logits(loaded_by_peft(tiny(arch), tmp_path), batch(arch)), logits(model, batch(arch)), **EXACT)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "mica"])
@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_twenty_steps_of_adamw_beside_peft(init, arch, tmp_path):
    trains_alike(configs(init, arch, target_modules=ATTENTION[arch][:2])[0], arch, tmp_path)


def both(init: str, arch: str, **options: Any) -> tuple[Any, Any]:
    """The two libraries' fresh models, from the same random stream."""
    made = []
    for library, config in zip((peft, deltatune), configs(init, arch, **options)):
        torch.manual_seed(11)
        made.append(library.get_peft_model(tiny(arch), config))
    return tuple(made)  # type: ignore[return-value]


@pytest.mark.parametrize("init", ["pissa", "olora", "mica"])
def test_fresh_factors_are_pefts(init):
    their_model, our_model = both(init, "llama", target_modules=["q_proj", "down_proj"], lora_alpha=7)
    expected = peft.get_peft_model_state_dict(their_model)
    found = deltatune.get_peft_model_state_dict(our_model)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ from data


@pytest.fixture
def attr(monkeypatch):
    """PEFT's CorDA imports a package that it does not ask for; `dataclass` is all that it takes of it."""
    fake = types.ModuleType("attr")
    fake.dataclass = dataclasses.dataclass  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "attr", sys.modules.get("attr", fake))


def running(model: nn.Module, backward: bool = False) -> Any:
    def run() -> None:
        for seed in range(4):
            loss = model(**batch("llama", rows=1, seed=seed)).loss
            loss.backward() if backward else None

    return run


def same_start(their_model: Any, our_model: Any) -> None:
    expected = peft.get_peft_model_state_dict(their_model)
    found = deltatune.get_peft_model_state_dict(our_model)
    assert expected.keys() == {key for key in found if "lora_start" not in key}
    for key, tensor in expected.items():  # a decomposition leaves the signs open
        assert_close(found[key].abs(), tensor.abs(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_begins_where_pefts_does(method, attr):
    from peft.tuners.lora.corda import preprocess_corda

    options = {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 6, "rank_pattern": {"q_proj": 2}}
    configs_ = configs("corda", "llama", corda_config={"corda_method": method}, **options)
    models = tiny("llama"), tiny("llama")
    preprocess_corda(models[0], configs_[0], running(models[0]))
    deltatune.preprocess_corda(models[1], configs_[1], running(models[1]))
    same_start(peft.get_peft_model(models[0], configs_[0]), deltatune.get_peft_model(models[1], configs_[1]))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("scale", ["stable", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga_begins_where_pefts_does(direction, scale):
    from peft.tuners.lora.loraga import preprocess_loraga

    chosen = {"direction": direction, "scale": scale, "stable_gamma": 25}
    options = {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 6}
    configs_ = configs("lora_ga", "llama", lora_ga_config=chosen, **options)
    models, made = (tiny("llama"), tiny("llama")), []
    for library, helper, model, config in zip(
        (peft, deltatune), (preprocess_loraga, deltatune.preprocess_loraga), models, configs_
    ):
        torch.manual_seed(2)
        helper(model, config, running(model, backward=True))
        made.append(library.get_peft_model(model, config))
    same_start(*made)


@pytest.mark.parametrize("options", [{}, {"rho": 1.0}, {"use_label_mask": False, "adjust_scaling_factors": False}])
def test_eva_has_pefts_components_ranks_and_patterns(options):
    names = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]
    configs_ = configs(
        "eva", "llama", target_modules=names, r=3, rank_pattern={"o_proj": 4}, eva_config={"tau": 0.9, **options}
    )
    data = [batch("llama", rows=6, seed=seed) for seed in range(3)]
    models = peft.get_peft_model(tiny("llama"), configs_[0]), deltatune.get_peft_model(tiny("llama"), configs_[1])
    peft.initialize_lora_eva_weights(models[0], data, show_progress_bar=False)
    deltatune.initialize_lora_eva_weights(models[1], data)
    theirs_, ours = (model.peft_config["default"] for model in models)
    assert (ours.rank_pattern, ours.alpha_pattern) == (theirs_.rank_pattern, theirs_.alpha_pattern)
    expected = peft.get_peft_model_state_dict(models[0])
    found = deltatune.get_peft_model_state_dict(models[1])
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert_close(found[key], tensor, rtol=1e-3, atol=1e-4)


# -------------------------------------------------------------------------------------------------- what PEFT cannot do


def test_files_of_peft_that_do_not_say_where_they_began_are_refused_here(tmp_path, attr):
    from peft.tuners.lora.corda import preprocess_corda

    base, config = tiny("llama"), configs("corda", "llama", target_modules=["q_proj"])[0]
    preprocess_corda(base, config, running(base))
    saved_by_peft(scatter(peft.get_peft_model(base, config), 3), tmp_path / "corda")
    saved_by_peft(theirs("llama", configs("pissa_niter_4", "llama", target_modules=["q_proj"])[0]), tmp_path / "fast")
    with pytest.raises(ValueError, match="`eigens` attribute not found"):
        loaded_by_peft(tiny("llama"), tmp_path / "corda")
    for name in ("corda", "fast"):
        model = tiny("llama")
        with pytest.raises(ConfigError, match="path_initial_model_for_weight_conversion"):
            deltatune.PeftModel.from_pretrained(model, tmp_path / name)
        assert not any("adapters" in path for path, _ in model.named_modules())


def test_a_corda_file_of_peft_is_read_where_the_data_have_been_collected_again(tmp_path, attr):
    from peft.tuners.lora.corda import preprocess_corda

    config, ours = configs("corda", "llama", target_modules=["q_proj"])
    base, again = tiny("llama"), tiny("llama")
    preprocess_corda(base, config, running(base))
    model = scatter(peft.get_peft_model(base, config), 3)
    saved_by_peft(model, tmp_path)
    deltatune.preprocess_corda(again, ours, running(again))
    loaded = deltatune.PeftModel.from_pretrained(again, tmp_path)
    assert_close(logits(loaded, batch("llama")), logits(model, batch("llama")), **EXACT)


def test_what_peft_does_not_load_or_loads_as_another_model(tmp_path):
    """PEFT's own limits, which are none here; when one of these changes, the table of docs/methods/lora.md does."""
    pissa = configs("pissa", "llama", target_modules=["q_proj"])[0]
    saved_by_peft(theirs("llama", pissa), tmp_path / "pissa")
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "pissa", low_cpu_mem_usage=True)
    deltatune.PeftModel.from_pretrained(tiny("llama"), tmp_path / "pissa", low_cpu_mem_usage=True)

    model, x = theirs("llama", pissa), batch("llama")
    with torch.no_grad(), model.disable_adapter():
        assert (logits(model, x) - logits(tiny("llama"), x)).abs().max() > 1e-3, "its base stays changed"

    with pytest.raises(ValueError, match="Unknown initialization"):
        peft.get_peft_model(
            nn.Sequential(nn.Conv2d(3, 8, 2)), peft.LoraConfig(target_modules=["0"], init_lora_weights="pissa")
        )
    with pytest.raises(TypeError):
        config = {
            "target_modules": ["0"],
            "init_lora_weights": "loftq",
            "loftq_config": {"loftq_bits": 4, "loftq_iter": 1},
        }
        peft.get_peft_model(nn.Sequential(nn.Embedding(64, 8)), peft.LoraConfig(**config))
    gpt2 = theirs("gpt2", configs("olora", "gpt2", target_modules=["c_attn"])[0])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        logits(gpt2, batch("gpt2"))


def test_a_converted_adapter_of_peft_is_read(tmp_path):
    config = configs("pissa", "llama", target_modules=["q_proj", "down_proj"])[0]
    model = peft.get_peft_model(tiny("llama"), config)
    model.peft_config["default"].init_lora_weights = True
    saved_by_peft(model, tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    scatter(model, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    loaded = deltatune.PeftModel.from_pretrained(tiny("llama"), tmp_path / "plain")
    assert_close(logits(loaded, batch("llama")), logits(model, batch("llama")), **EXACT)


@pytest.mark.parametrize("name", ["EvaConfig", "CordaConfig", "LoftQConfig", "LoraRuntimeConfig", "LoraGAConfig"])
def test_fields_and_defaults_of_the_options_are_pefts(name):
    from peft.tuners.lora import config as their_configs

    def fields(kind: Any) -> dict[str, Any]:
        return {field.name: field.default for field in dataclasses.fields(kind)}

    assert fields(getattr(deltatune, name)) == fields(getattr(their_configs, name))


@pytest.mark.parametrize(
    "name", ["get_eva_state_dict", "initialize_lora_eva_weights", "replace_lora_weights_loftq", "preprocess_loraga"]
)
def test_helpers_take_pefts_arguments(name):
    import inspect

    from peft.tuners.lora import loraga

    theirs_, ours = getattr(peft, name, getattr(loraga, name, None)), getattr(deltatune, name)
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs_).parameters)
