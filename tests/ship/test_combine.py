"""Several adapters as one in a folder: against the dense equations, from words and from mergekit's YAML, and scored."""

import json

import pytest
import torch
import yaml
from typer.testing import CliRunner

import deltatune as d
from deltatune.cli.app import app
from deltatune.demo.base import load_base
from deltatune.errors import ConfigError, FormatError, MergeError, SaveError
from deltatune.inject import adapted_layers
from deltatune.inspect import inspect_adapter
from deltatune.ship import Part, Recipe, combine_adapters, read_recipe

ROWS = [{"input": "name: Aromi | food: English", "target": "Aromi serves English food."}] * 3


def adapter(folder, seed, **options):
    base, tokenizer = load_base()
    model = d.get_peft_model(
        base, d.LoraConfig(**{"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v"], "r": 2, **options})
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.peft_config["default"].base_model_name_or_path = "demo"
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return adapter(folder / "a", 1), adapter(folder / "b", 2, r=3, lora_alpha=4)


@torch.no_grad()
def changes(folder):
    """Layer -> W' - W."""
    model = d.PeftModel.from_pretrained(load_base()[0], str(folder))
    return {path: layer.get_delta_weight("default") for path, layer in adapted_layers(model.get_base_model())}


def assert_combined(folder, two, rule, atol=1e-6):
    a, b = map(changes, two)
    made = changes(folder)
    assert made.keys() == a.keys()
    for path, change in made.items():
        torch.testing.assert_close(change, rule(a[path], b[path]), atol=atol, rtol=1e-4)


def recipe(tmp_path, method, two, own=({}, {}), **keys):
    """A file of mergekit's, read."""
    models = [{"model": name, "parameters": {"weight": w, **more}} for name, w, more in zip(two, (0.7, -0.3), own)]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"merge_method": method, "models": models, "base_model": "demo", **keys}))
    return read_recipe(file)


def top(tensor, density):
    """The largest share of the entries."""
    limit = tensor.abs().flatten().sort(descending=True).values[int(density * tensor.numel()) - 1]
    return torch.where(tensor.abs() >= limit, tensor, 0)


def test_the_sum_from_the_command_line(two, tmp_path):
    out, rows = tmp_path / "out", tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    done = CliRunner().invoke(
        app, ["combine", f"{two[0]}=0.7", f"{two[1]}=-0.3", str(out), "--eval-file", str(rows), "--json"]
    )
    assert done.exit_code == 0, done.output
    assert_combined(out, two, lambda a, b: 0.7 * a - 0.3 * b)
    scores = json.loads(done.stdout)["scores"]
    assert list(scores) == ["base", *two, "result"]
    assert len({round(scored["loss"], 6) for scored in scores.values()}) == 4  # each is what it says
    alone = combine_adapters(Recipe((Part(two[0]),)), tmp_path / "alone", eval_file=str(rows)).scores
    assert alone["result"]["loss"] == pytest.approx(scores[two[0]]["loss"], rel=1e-5)
    assert alone["base"]["loss"] == pytest.approx(scores["base"]["loss"])
    origin = inspect_adapter(out).origin
    assert origin.data["adapters"] == {two[0]: 0.7, two[1]: -0.3}
    assert origin.command.startswith("deltatune")
    shown = CliRunner().invoke(app, ["inspect", str(out)])
    assert shown.exit_code == 0, shown.output
    assert "result, on" in shown.stdout
    answered = CliRunner().invoke(app, ["generate", str(out), ROWS[0]["input"], "--max-new-tokens", "3"])
    assert answered.exit_code == 0, answered.output


def test_the_table_beside_the_result(two, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(ROWS[0]) + "\n")
    words = [
        "combine",
        *two,
        str(tmp_path / "out"),
        "--type",
        "ties_svd",
        "--density",
        "0.5",
        "--rank",
        "2",
        "-e",
        str(rows),
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "lost to the rank" in done.stdout
    assert "the rank of" in done.stderr
    assert "perplexity" in done.stdout
    assert d.PeftConfig.from_pretrained(tmp_path / "out").r == 2


def test_mergekits_linear_is_a_mean_and_task_arithmetic_a_sum(two, tmp_path):
    combine_adapters(recipe(tmp_path, "linear", two), tmp_path / "mean")
    assert_combined(tmp_path / "mean", two, lambda a, b: (0.7 * a - 0.3 * b) / 0.4)
    combine_adapters(recipe(tmp_path, "task_arithmetic", two), tmp_path / "sum")
    assert_combined(tmp_path / "sum", two, lambda a, b: 0.7 * a - 0.3 * b)


def test_a_base_among_the_models_takes_its_share(two, tmp_path):
    models = [{"model": m, "parameters": {"weight": w}} for m, w in ((two[0], 1), ("demo", 2), (f"demo+{two[1]}", 1))]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"merge_method": "linear", "models": models, "base_model": "demo"}))
    combine_adapters(read_recipe(file), tmp_path / "out")
    assert_combined(tmp_path / "out", two, lambda a, b: (a + b) / 4)


@pytest.mark.parametrize("normalize", [True, False])
def test_mergekits_ties_with_a_density_each(two, tmp_path, normalize):
    """Trim each by its density, elect by the weighted sum, add up what agrees, divide by the weights that agree."""
    asked = recipe(tmp_path, "ties", two, ({"density": 0.5}, {"density": 0.25}), parameters={"normalize": normalize})
    combine_adapters(dense(asked), tmp_path / "out")

    def rule(a, b):
        parts = torch.stack([0.7 * top(a, 0.5), -0.3 * top(b, 0.25)])
        agree = parts.sign() == torch.where(parts.sum(0) >= 0, 1, -1)
        weight = (torch.tensor([0.7, -0.3]).view(2, 1, 1) * agree).sum(0)
        return (parts * agree).sum(0) / torch.where(weight == 0, 1, weight) if normalize else (parts * agree).sum(0)

    assert_combined(tmp_path / "out", two, rule, atol=1e-5)


def dense(asked, rank=192):
    """So high that nothing is lost."""
    return Recipe(asked.parts, asked.type, rank, asked.sign_method, asked.consensus, asked.base, asked.dtype)


def test_mergekits_dare_drops_and_rescales(two, tmp_path):
    asked = recipe(tmp_path, "dare_linear", two, ({"density": 0.5}, {}), dtype="bfloat16")
    combine_adapters(dense(asked), tmp_path / "out")
    a, b = map(changes, two)
    for path, change in changes(tmp_path / "out").items():
        rest = (change + 0.3 * b[path]) / (0.7 * a[path])  # 0 or 2 where it is not too small to tell
        rest = rest[(a[path].abs() > a[path].abs().median())]
        kept = (rest - 2).abs() < 0.3
        assert (kept | (rest.abs() < 0.3)).float().mean() > 0.98
        assert 0.4 < kept.float().mean() < 0.6
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"merge_method": "tise"}, "merge_method"),
        ({"slices": []}, "slices"),
        ({"models": []}, "models"),
        ({"parameters": {"weight": [0.1, 0.9]}, "models": [{"model": "a"}]}, "weight"),
        ({"models": [{"model": "a"}]}, "weight"),
        ({"models": [{"model": "other+a", "parameters": {"weight": 1}}]}, "model"),
        ({"parameters": {"normalize": False}}, "normalize"),
        ({"dtype": "int8"}, "dtype"),
        ({"parameters": {"lambda": 2}}, "lambda"),
    ],
)
def test_what_a_recipe_cannot_mean_is_refused_by_its_key(change, field, tmp_path):
    file = tmp_path / "recipe.yaml"
    held = {"merge_method": "linear", "base_model": "demo", "models": [{"model": "a", "parameters": {"weight": 0.5}}]}
    file.write_text(yaml.safe_dump({**held, **change}))
    with pytest.raises(ConfigError) as caught:
        read_recipe(file)
    assert caught.value.field == field


def test_a_refused_combination_leaves_nothing(two, tmp_path):
    out = tmp_path / "out"
    refusals = [
        (MergeError, Recipe((Part(two[0]), Part(two[1])), "ties_svd")),  # no density
        (MergeError, Recipe((Part(two[0]), Part(two[1])), "ties", sign_method="most")),
        (MergeError, Recipe((Part(two[0], density=0.5), Part(two[1])), "ties_svd")),
        (MergeError, Recipe((Part(two[0]), Part(two[1])), consensus="sum")),  # of what is not elected
        (FormatError, Recipe((Part(two[0]), Part(str(tmp_path / "gone"))))),
    ]
    for error, asked in refusals:
        with pytest.raises(error):
            combine_adapters(asked, out)
    done = CliRunner().invoke(app, ["combine", f"{two[0]}=much", str(out)])
    assert done.exit_code == 2
    assert "weight='much'" in done.stderr
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(SaveError, match="is there already"):
        combine_adapters(Recipe((Part(two[0]),)), out)
