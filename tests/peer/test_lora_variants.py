"""LoRA's variants beside PEFT 0.21.2: files both ways, training from equal tensors, and what PEFT itself refuses."""

from __future__ import annotations

import random
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import deltatune
from deltatune.errors import MismatchError
from tests.core.tiny import TASKS, batch, logits, tiny
from tests.peer import crossing
from tests.peer.crossing import EXACT
from tests.peer.pairs import ATTENTION, EMBEDDING, configs, loaded_by_peft, peft, saved_by_peft, scatter, theirs

quiet = pytest.mark.filterwarnings("ignore:.*match no module:deltatune.PeftWarning")


def options(variant: str, arch: str, draw: random.Random) -> dict[str, Any]:
    """Random options of one variant that fit an architecture."""
    names = sorted(draw.sample(ATTENTION[arch], draw.randint(2, 3)))
    found: dict[str, Any] = {
        "target_modules": names,
        "r": draw.choice([2, 4]),
        "lora_alpha": draw.choice([1, 7]),
        "use_rslora": draw.random() < 0.5,
        "lora_dropout": draw.choice([0.0, 0.2]),
    }
    if draw.random() < 0.4:
        found["rank_pattern"] = {names[0]: 6}
    if draw.random() < 0.4:
        found["alpha_pattern"] = {names[-1]: 5}
    if variant == "dora":
        found |= {"use_dora": True, "init_lora_weights": draw.choice([True, False, "gaussian"])}
        if draw.random() < 0.3:
            found["target_modules"] = [*names, EMBEDDING[arch]]
    elif variant == "kasa":
        found["kasa_config"] = {"beta": draw.random(), "gamma": draw.random()}
    elif variant == "bdlora":
        found["use_bdlora"] = {
            "target_modules_bd_a": names[:1],
            "target_modules_bd_b": names[1:2],
            "nblocks": draw.choice([1, 2]),
            "match_strict": False,
        }
    elif variant == "monteclora":
        found["monteclora_config"] = {"num_samples": draw.choice([1, 2, 5]), "use_entropy": draw.random() < 0.5}
    elif variant == "velora":
        kinds = ["batch_average", "batch_average_once", "random"]
        found["velora_config"] = {"num_groups": draw.choice([1, 3, 16]), "init_type": draw.choice(kinds), "scale": 2.0}
    return found


# PEFT's KaSA and BD-LoRA do not know transformers' Conv1D; names of T5's layers ("q", "o") are in all paths.
ARCHITECTURES = {
    "dora": ("llama", "gpt2", "bert", "t5", "bart"),
    "kasa": ("llama", "bert", "t5", "bart"),
    "bdlora": ("llama", "bert"),
    "monteclora": ("llama", "gpt2", "bert", "t5"),
    "velora": ("llama", "gpt2", "bert", "t5"),
}


@quiet
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variant,arch", [(v, a) for v, known in ARCHITECTURES.items() for a in known])
def test_random_options_cross_over(variant, arch, seed, tmp_path):
    drawn = options(variant, arch, random.Random(f"{variant}{arch}{seed}"))
    their_model, our_model = crossing.crosses_over(*configs("lora", arch, **drawn), arch, tmp_path)
    assert their_model.get_nb_trainable_parameters() == our_model.get_nb_trainable_parameters()


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 6, 2, bias=False)
        self.line = nn.Conv1d(6, 8, 2)
        self.space = nn.Conv3d(2, 4, 2)

    def forward(self, x):
        x = self.line(self.second(torch.tanh(self.first(x))).flatten(2))
        return self.space(torch.tanh(x).unflatten(1, (2, 4)).unflatten(3, (2, -1)))


def convolutions() -> Convolutions:
    torch.manual_seed(7)
    return Convolutions().eval()


def test_dora_on_convolutions_crosses_over(tmp_path):
    arguments = {"use_dora": True, "r": 3, "target_modules": ["first", "second", "line", "space"]}
    model = scatter(peft.get_peft_model(convolutions(), peft.LoraConfig(**arguments)), 3)
    x = torch.randn(2, 4, 11, 11)
    ours = deltatune.PeftModel.from_pretrained(convolutions(), saved_by_peft(model, tmp_path / "theirs"))
    assert_close(ours(x), model(x), **EXACT)
    made = scatter(deltatune.get_peft_model(convolutions(), deltatune.LoraConfig(**arguments)), 4)
    made.save_pretrained(tmp_path / "ours")
    assert_close(loaded_by_peft(convolutions(), tmp_path / "ours")(x), made(x), **EXACT)


TRAINED = [
    *[(arch, {"use_dora": True}) for arch in ("llama", "gpt2", "bert", "t5")],
    ("llama", {"use_dora": True, "use_rslora": True, "lora_dropout": 0.2}),
    ("bert", {"use_dora": True, "lora_dropout": 0.5}),
    ("llama", {"kasa_config": {"beta": 0.0, "gamma": 0.0}, "lora_dropout": 0.2}),
    ("bert", {"kasa_config": {"beta": 0.0, "gamma": 0.0}}),
    ("llama", {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2}}),
    ("llama", {"velora_config": {"num_groups": 4}}),
    ("bert", {"velora_config": {"num_groups": 5, "init_type": "batch_average_once", "scale": 0.7}}),
    ("gpt2", {"velora_config": {"num_groups": 8, "init_type": "random"}, "lora_dropout": 0.1}),
]
NAMES = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "bert": ["query", "value"], "t5": ["q", "wo"]}


@quiet
@pytest.mark.parametrize("arch,changes", TRAINED, ids=str)
def test_training_gives_the_same_losses(arch, changes, tmp_path):
    """Twenty steps of AdamW from equal tensors; dropout draws the same numbers."""
    model = theirs(arch, configs("lora", arch, target_modules=NAMES[arch], **changes)[0])
    ours = deltatune.PeftModel.from_pretrained(tiny(arch), saved_by_peft(model, tmp_path), is_trainable=True)
    torch.manual_seed(2)
    expected = crossing.losses(model, arch, 20)
    torch.manual_seed(2)
    assert crossing.losses(ours, arch, 20) == pytest.approx(expected, abs=1e-4)
    assert expected[-4] < expected[0]


@quiet
@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_dora_over_a_base_that_gives_way(init, dropout, tmp_path):
    """Its lengths are those of W + s (B A - B0 A0), of which dropout thins what trains and what the length changes."""
    drawn = {"use_dora": True, "init_lora_weights": init, "lora_dropout": dropout, "target_modules": ["q_proj"]}
    crossing.crosses_over(*configs("lora", "llama", r=4, **drawn), "llama", tmp_path / "files")
    model = theirs("llama", configs("lora", "llama", r=4, **drawn)[0])
    folder = saved_by_peft(model, tmp_path / "trained")
    ours = deltatune.PeftModel.from_pretrained(tiny("llama"), folder, is_trainable=True)
    torch.manual_seed(2)
    expected = crossing.losses(model, "llama", 20)
    torch.manual_seed(2)
    assert crossing.losses(ours, "llama", 20) == pytest.approx(expected, abs=1e-4)


def test_kasas_loss_is_the_one_that_peft_has_for_users_to_add(tmp_path):
    model = theirs("llama", configs("lora", "llama", kasa_config={"beta": 0.1, "gamma": 0.2})[0])
    ours = deltatune.PeftModel.from_pretrained(tiny("llama"), saved_by_peft(model, tmp_path), is_trainable=True)
    assert_close(ours.penalty(), model.base_model._get_kasa_loss())


def test_monteclora_draws_as_peft_does():
    """The same distribution of updates, from another stream of random numbers."""
    arguments = {"r": 3, "target_modules": ["0"], "monteclora_config": {"num_samples": 3, "sample_scaler": 0.5}}
    spreads = []
    for library in (peft, deltatune):
        torch.manual_seed(0)
        model = library.get_peft_model(nn.Sequential(nn.Linear(30, 3, bias=False)), library.LoraConfig(**arguments))
        for name, parameter in model.named_parameters():
            if "prior" in name:
                nn.init.constant_(parameter, 0.3)
            elif "lora_B" in name:
                nn.init.eye_(parameter)
        model.train()
        with torch.no_grad():
            drawn = torch.stack([model(torch.eye(30)) for _ in range(1500)])
        spreads.append((drawn - drawn.mean(dim=0)).square().mean(dim=(0, 1)))
    assert_close(spreads[0], spreads[1], rtol=0.1, atol=0)


def test_qalora_computes_what_pefts_does():
    """PEFT runs it on GPTQ layers only, so its function is called by itself."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    torch.manual_seed(0)
    base = nn.ModuleDict({"layer": nn.Linear(12, 5)})
    config = deltatune.LoraConfig(use_qalora=True, qalora_group_size=3, r=2, target_modules=["layer"], lora_alpha=6)
    layer = scatter(deltatune.get_peft_model(base, config), 1).get_base_model()["layer"]
    lora = layer.adapters["default"]
    like = SimpleNamespace(
        lora_A={"x": lora.lora_A}, lora_B={"x": lora.lora_B}, lora_dropout={"x": nn.Identity()}, training=False,
        scaling={"x": 3.0}, qalora_group_size={"x": 3}, in_features=12,
    )  # fmt: skip
    x = torch.randn(2, 4, 12)
    expected = QALoraLinearVariant.forward(like, active_adapter="x", x=x, result=layer.base_layer(x))
    assert_close(layer(x), expected)


# --------------------------------------------------------------------------------------------------------------- aLoRA


def invoked() -> torch.Tensor:
    torch.manual_seed(1)
    ids = torch.randint(10, 60, (3, 9))
    ids[0, 2:4] = ids[0, 5:7] = ids[1, 7:9] = torch.tensor([7, 8])
    return ids


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_alora_acts_where_pefts_does(arch, tmp_path):
    arguments = {"target_modules": ATTENTION[arch][:2], "alora_invocation_tokens": [7, 8]}
    their_config, our_config = configs("lora", arch, **arguments)
    ids, model = invoked(), theirs(arch, their_config)
    forced = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected, answers = model(input_ids=ids).logits, model.generate(input_ids=ids, **forced)
        ours = deltatune.PeftModel.from_pretrained(tiny(arch), saved_by_peft(model, tmp_path / "theirs"))
        assert_close(ours(input_ids=ids).logits, expected, **EXACT)
        assert torch.equal(ours.generate(input_ids=ids, **forced), answers)
        made = scatter(deltatune.get_peft_model(tiny(arch), our_config), 4)
        made.save_pretrained(tmp_path / "ours")
        again = loaded_by_peft(tiny(arch), tmp_path / "ours")
        assert_close(again(input_ids=ids).logits, made(input_ids=ids).logits, **EXACT)


def test_alora_trains_as_pefts_does(tmp_path):
    model = theirs("llama", configs("lora", "llama", target_modules=["q_proj"], alora_invocation_tokens=[7, 8])[0])
    ours = deltatune.PeftModel.from_pretrained(tiny("llama"), saved_by_peft(model, tmp_path), is_trainable=True)

    def losses(model: Any) -> list[float]:
        optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-2)
        found = []
        for _ in range(20):
            loss = model(input_ids=invoked(), labels=invoked()).loss
            loss.backward()
            optimizer.step(), optimizer.zero_grad()
            found.append(loss.item())
        return found

    expected = losses(model)
    assert losses(ours) == pytest.approx(expected, abs=1e-4) and expected[-1] < expected[0]


# --------------------------------------------------------------------------------------------------------------- Arrow


@pytest.mark.parametrize("general", [0, 2])
def test_arrow_routes_as_pefts_does(general, tmp_path):
    """PEFT finds singular vectors by fifteen power iterations, so each update here has one that stands out."""
    folders = []
    for seed in range(3 + general):
        model = theirs("llama", configs("lora", "llama", target_modules=["q_proj", "up_proj"], r=3)[0], seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter *= torch.tensor([[1.0], [0.02], [0.02], [0.01]])[: len(parameter)]
        folders.append(str(saved_by_peft(model, tmp_path / str(seed))))
    found = []
    for library in (peft, deltatune):
        config = library.ArrowConfig(top_k=2, router_temperature=0.5, use_gks=bool(general))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.create_arrow_model(tiny("llama"), folders[:3], config, folders[3:] or None)
        with torch.no_grad():
            found.append(logits(model.eval(), batch("llama")))
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if general else EXACT  # a difference of updates has no such gap
    assert_close(found[1], found[0], **tolerance)


# ----------------------------------------------------------------------------------------- what PEFT does not do itself


def makes(**arguments: Any) -> Any:
    return lambda arch="llama", **more: peft.get_peft_model(
        tiny(arch), peft.LoraConfig(target_modules=ATTENTION[arch][:2], r=4, **arguments, **more)
    )


REFUSED_BY_PEFT = {
    "two variants": (makes(use_dora=True, kasa_config=peft.KasaConfig()), "unsupported variant combination"),
    "DoRA with a bias": (makes(use_dora=True, lora_bias=True), "not supported for DoRA"),
    "DoRA that acts from tokens on": (makes(use_dora=True, alora_invocation_tokens=[1]), "unsupported variant"),
    "KaSA on Conv1D": (lambda: makes(kasa_config=peft.KasaConfig())("gpt2"), "fan_in_fan_out"),
    "BD-LoRA on Conv1D": (
        lambda: makes(use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["c_"], nblocks=2))("gpt2"),
        "has no attribute 'in_features'",
    ),
}


@pytest.mark.parametrize("case", REFUSED_BY_PEFT)
def test_what_peft_refuses_is_listed_here(case):
    make, words = REFUSED_BY_PEFT[case]
    with warnings.catch_warnings(), pytest.raises((ValueError, AttributeError), match=words):
        warnings.simplefilter("ignore")
        make()


def test_peft_ignores_qalora_on_layers_that_are_not_gptqs_and_such_a_folder_is_refused_by_its_shapes(tmp_path):
    model = makes(use_qalora=True, qalora_group_size=4)()
    assert {p.shape[1] for name, p in model.named_parameters() if "lora_A" in name} == {16}
    with pytest.raises(MismatchError, match=r"lora_A.*\(4, 16\).*\(4, 4\)"):
        deltatune.PeftModel.from_pretrained(tiny("llama"), saved_by_peft(model, tmp_path))


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_dora": True, "kasa_config": {}},
        {"use_dora": True, "use_qalora": True, "qalora_group_size": 4},
        {"use_dora": True, "velora_config": {"num_groups": 4}, "use_rslora": True},
        {"use_qalora": True, "qalora_group_size": 4, "monteclora_config": {}, "kasa_config": {}},
        {"use_bdlora": {"target_modules_bd_b": ["q", "c_attn"], "nblocks": 2, "match_strict": False}, "use_dora": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_of_those_we_do_training_files_and_merging_work(arch, arguments, tmp_path):
    config = deltatune.LoraConfig(target_modules=ATTENTION[arch][:2], r=4, task_type=TASKS[arch], **arguments)
    torch.manual_seed(0)
    model = deltatune.get_peft_model(tiny(arch), config)
    found = crossing.losses(model, arch, 12, lr=1e-2)
    assert found[8] < found[0]
    expected = logits(model.eval(), batch(arch))
    model.save_pretrained(tmp_path)
    again = deltatune.PeftModel.from_pretrained(tiny(arch), tmp_path)
    assert torch.equal(logits(again, batch(arch)), expected)
    assert_close(logits(again.merge_and_unload(), batch(arch)), expected, rtol=1e-3, atol=1e-3)
