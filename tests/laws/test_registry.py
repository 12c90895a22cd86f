"""Guards: a method is one file that registers itself once, and the laws see all of its options."""

import dataclasses
import importlib
import pkgutil

import pytest

import deltatune.methods
import deltatune.outputs
from deltatune.adapter import Method
from deltatune.methods.common import LayerConfig
from deltatune.registry import METHODS
from tests.laws.examples import LAYER_METHODS, small, variants

PACKAGES = (deltatune.methods, deltatune.outputs)
FILES = sorted(
    f"{package.__name__}.{file.name}"
    for package in PACKAGES
    for file in pkgutil.iter_modules(package.__path__)
    if hasattr(importlib.import_module(f"{package.__name__}.{file.name}"), "METHOD")
)


@pytest.mark.parametrize("file", FILES)
def test_each_method_file_registers_exactly_one_method(file):
    module = importlib.import_module(file)
    defined = [value for value in vars(module).values() if isinstance(value, Method)]
    assert defined == [module.METHOD]
    assert METHODS[module.METHOD.peft_type] is module.METHOD
    assert module.METHOD.adapter.__module__ == module.__name__
    assert vars(module)[module.METHOD.config.__name__] is module.METHOD.config


def test_every_registered_layer_method_has_a_file():
    homes = {method.adapter.__module__ for method in METHODS.values() if method.adapter is not None}
    assert homes == set(FILES)


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_a_config_names_its_method(name):
    method = LAYER_METHODS[name]
    assert method.config(**small(name)).peft_type is method.peft_type


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_tensors_in_files_begin_with_the_prefix_of_the_method(name):
    from tests.laws.examples import Case

    model = Case(name, "default", "linear").model()
    prefix = LAYER_METHODS[name].key_prefix
    assert all(any(part.startswith(prefix) for part in key.split(".")[-2:]) for key in model.adapter_tensors("default"))


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_the_laws_see_options_of_every_method(name):
    own = {field.name for field in dataclasses.fields(LAYER_METHODS[name].config)}
    assert len(variants(name)) > 1 or own == {field.name for field in dataclasses.fields(LayerConfig)}
