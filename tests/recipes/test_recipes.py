"""Every recipe is taken by `train` as it stands, and by its own schema, which refuses what `train` refuses."""

import pytest
import yaml

from deltatune.errors import ConfigError
from deltatune.recipes import TASKS, recipe, settings_schema
from deltatune.recipes.options import options
from deltatune.recipes.write import MARK
from deltatune.train import TrainSettings
from deltatune.train.defaults import learning_rate, with_defaults
from deltatune.train.method import method_names

NEEDS = {"cpt", "trainable_tokens", "xlora"}  # methods that do nothing until tokens or experts are named


@pytest.fixture(scope="module")
def validator():
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema = settings_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def values(task, method, uncomment=False):
    """The recipe read back; also with its commented options taken in."""
    text = recipe(task, method)
    assert MARK not in text
    if uncomment:
        lines = text.splitlines()
        at = lines.index(next(line for line in lines if line.startswith("method:")))
        end = lines.index(next(line for line in lines if line.startswith("learning_rate:")))
        text = "\n".join([*lines[:at], *(line.removeprefix("# ") for line in lines[at:end]), *lines[end:]])
    return yaml.safe_load(text)


@pytest.mark.parametrize("method", method_names())
def test_train_takes_the_recipe_of_every_method(method):
    read = values("causal" if method == "cpt" else "classification", method)  # CPT is for decoders alone
    if method in NEEDS:
        read = {**read, **_missing(method)}
    made = TrainSettings(**read)
    assert made.method == method
    assert made.learning_rate == pytest.approx(learning_rate(method, with_defaults(method, {})), rel=0.01)
    assert made.method_options == {**with_defaults(method, {}), **(_missing(method) if method in NEEDS else {})}


@pytest.mark.parametrize("task", TASKS)
def test_train_takes_the_recipe_of_every_task(task):
    made = TrainSettings(**values(task, "lora"))
    assert made.task == task
    assert max(map(len, recipe(task, "lora").splitlines())) <= 120


@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "ia3", "oft", "p_tuning"])
def test_options_in_comments_are_the_defaults(method):
    plain, whole = TrainSettings(**values("chat", method)), TrainSettings(**values("chat", method, uncomment=True))
    defaults = {option.name: option.default for option in options(method)}
    added = {name: value for name, value in whole.method_options.items() if name not in plain.method_options}
    assert added == {name: defaults[name] for name in added}


def test_other_names_are_understood_and_unknown_ones_refused():
    assert recipe("ner", "prefix") == recipe("token_classification", "prefix_tuning")
    with pytest.raises(ConfigError, match="classification"):
        recipe("clasification")
    with pytest.raises(ConfigError, match="lora"):
        recipe("chat", "lorra")


@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "full"])
def test_the_schema_takes_recipes(validator, method):
    for task in TASKS:
        validator.validate(values(task, method))


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rat": 1e-3},
        {"num_virtual_tokens": 20},  # of another method
        {"learning_rate": "fast"},
        {"task": "clasification"},
        {"method": "prefix_tuning", "r": 8},
    ],
)
def test_the_schema_refuses_what_train_refuses(validator, wrong):
    given = {"task": "classification", "train_file": "x.jsonl", **wrong}
    assert list(validator.iter_errors(given))
    with pytest.raises(ConfigError):
        TrainSettings(**given)


@pytest.mark.parametrize(
    "right", [{"lora_r": 16}, {"lr": 1e-3, "epochs": 2}, {"method": "prefix", "num_virtual_tokens": 5}, {"r": 4}]
)
def test_the_schema_takes_other_programs_names(validator, right):
    validator.validate({"task": "ner", "data": "x.jsonl", **right})
    TrainSettings(**{"task": "ner", "data": "x.jsonl", **right})


def _missing(method):
    return {
        "cpt": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
        "trainable_tokens": {"token_indices": [1]},
        "xlora": {"hidden_size": 8, "adapters": {"0": "a"}},
    }[method]
