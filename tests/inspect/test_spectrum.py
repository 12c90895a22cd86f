"""How much of a rank is used, and how two adapters differ: against changes that are known."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import deltatune as d
from deltatune.cli.app import app
from deltatune.inspect import diff_adapters, inspect_adapter
from deltatune.inspect.spectrum import spectra

LAYER = "base_model.model.layers.0.proj"


def factors(values, rank, out=6, inner=5):
    """A (rank, inner) and B (out, rank) whose product has these singular values."""
    torch.manual_seed(0)
    Q, P = torch.linalg.qr(torch.randn(out, out))[0], torch.linalg.qr(torch.randn(inner, inner))[0]
    A, B = torch.zeros(rank, inner), torch.zeros(out, rank)
    for i, value in enumerate(values):
        A[i], B[:, i] = P[i], value * Q[:, i]
    return {f"{LAYER}.lora_A.weight": A, f"{LAYER}.lora_B.weight": B}


def spectrum(values, rank=4, **options):
    config = d.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["proj"], **options)
    (found,) = spectra(config, factors(values, rank), "lora")
    return found


def test_the_singular_values_decide():
    even = spectrum([3.0, 3.0, 3.0, 3.0])
    assert (even.rank, even.dead, even.needed) == (4, 0, 4)
    assert even.effective_rank == pytest.approx(4)
    assert even.scaling == 2
    assert (even.norm, even.largest) == (pytest.approx(12), pytest.approx(6))
    one = spectrum([5.0])
    assert (one.dead, one.needed) == (3, 1)
    assert one.effective_rank == pytest.approx(1)
    two = spectrum([4.0, 0.1, 0.1])  # 99 % of the square is in the first
    assert (two.dead, two.needed) == (1, 1)
    shares = [4 / 4.2, 0.1 / 4.2, 0.1 / 4.2]
    assert two.effective_rank == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)), rel=1e-4)


def test_an_untrained_layer_has_nothing_but_dead_directions():
    none = spectrum([])
    assert (none.norm, none.effective_rank, none.needed, none.dead) == (0, 0, 0, 4)


def test_scalings_are_those_of_the_layer():
    assert spectrum([1.0], use_rslora=True).scaling == 4
    assert spectrum([1.0], alpha_pattern={"proj": 1}).scaling == 0.25


@pytest.fixture
def folder(tmp_path):
    """Saves LoRA on a small model under a name, its factors changed by a function."""

    def make(name, change=lambda tensors: None, **options):
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
        options = {"r": 2, "target_modules": ["0", "1"], **options}
        model = d.get_peft_model(base, d.LoraConfig(**options, init_lora_weights=False))
        model.save_pretrained(str(tmp_path / name))
        file = tmp_path / name / "adapter_model.safetensors"
        tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
        change(tensors)
        save_file(tensors, file)
        return tmp_path / name

    return make


def test_the_same_change_in_other_numbers_is_the_same(folder):
    def turned(tensors):
        for key in tensors:
            tensors[key] *= 4 if "lora_A" in key else 1 / 8  # the scaling is doubled

    found = diff_adapters(folder("a"), folder("b", turned, lora_alpha=16))
    assert found.identical
    assert found.options == {"lora_alpha": (8, 16)}
    assert [distance.cosine for distance in found.distances] == pytest.approx([1, 1])


def test_what_differs_is_measured(folder):
    def opposite(tensors):
        tensors["base_model.model.0.lora_B.weight"] *= -1

    first, second = diff_adapters(folder("a"), folder("b", opposite)).distances
    assert (first.relative, first.cosine) == (pytest.approx(2), pytest.approx(-1))
    assert second.relative == 0
    tensors = load_file(folder("a") / "adapter_model.safetensors")
    product = tensors["base_model.model.0.lora_B.weight"] @ tensors["base_model.model.0.lora_A.weight"]
    assert first.norms == pytest.approx([4 * product.norm().item()] * 2, rel=1e-5)


def test_other_ranks_and_other_layers(folder):
    wider = diff_adapters(folder("a"), folder("b", r=3))
    assert wider.unlike == {}
    assert all(distance.relative > 0.1 for distance in wider.distances)
    fewer = diff_adapters(folder("a"), folder("c", target_modules=["0"]))
    assert (fewer.only_first, fewer.only_second) == (["1"], [])
    assert not fewer.identical
    assert fewer.same_base is None  # the files were written again without our header


def test_the_verbs(folder):
    run = CliRunner()
    a, b = folder("a"), folder("b", lambda tensors: tensors["base_model.model.1.lora_A.weight"].mul_(2))
    told = run.invoke(app, ["diff", str(a), str(b)])
    assert told.exit_code == 0, told.output
    assert "1 differ, 1 are the same" in told.stdout
    assert max(map(len, told.stdout.splitlines())) <= 80
    plain = json.loads(run.invoke(app, ["diff", str(a), str(b), "--json"]).stdout)
    assert plain["identical"] is False
    shown = run.invoke(app, ["inspect", str(a)])
    assert "product B A" in shown.stdout
    assert len(inspect_adapter(a).spectra) == 2
    assert run.invoke(app, ["diff", str(a), str(a / "nowhere")]).exit_code == 3
