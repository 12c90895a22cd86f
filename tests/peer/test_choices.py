"""The same layers are chosen, and the same is said about them."""

import pytest

import deltatune
from deltatune.errors import TargetError
from tests.core.tiny import tiny
from tests.peer.pairs import ATTENTION, PAIRS, configs, drawn, peft, theirs

quiet = pytest.mark.filterwarnings("ignore:.*match no module:deltatune.PeftWarning")
CHOICES = [
    {"target_modules": "all-linear"},
    {"target_modules": r".*\.(q|q_proj|query|c_attn)"},
    {"target_modules": r".*(1|2).*\.(v|v_proj|value|c_proj)$"},
    {"layers_to_transform": [0]},
    {"layers_to_transform": 1},
    {"layers_to_transform": [0, 1], "layers_pattern": ["h", "layers", "layer", "block"]},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
    {"exclude_modules": r".*\.0\..*"},
    {"exclude_modules": ["q_proj", "q", "query"]},
    {"target_modules": "all-linear", "exclude_modules": ["o", "o_proj", "dense"]},
    {"target_modules": ["0.attn.c_attn", "0.self_attn.q_proj", "SelfAttention.q", "0.attention.self.query"]},
]


def chosen(get, arch, config):
    model = get(tiny(arch), config)
    return sorted(name.removeprefix("base_model.model.") for name, m in model.named_modules() if _is_wrapper(m))


def _is_wrapper(module) -> bool:
    return isinstance(module, (deltatune.AdaptedLayer, peft.tuners.tuners_utils.BaseTunerLayer)) and not isinstance(
        module, peft.utils.other.AuxiliaryTrainingWrapper
    )


@quiet
@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("arch", ATTENTION)
def test_the_same_layers_are_adapted(arch, choice):
    options = {"target_modules": ATTENTION[arch][:2], **choice}
    their_config, our_config = configs("lora", arch, **options)
    try:
        expected = chosen(peft.get_peft_model, arch, their_config)
    except ValueError as error:
        assert "Target modules" in str(error) or "No modules" in str(error)
        with pytest.raises(TargetError):
            deltatune.get_peft_model(tiny(arch), our_config)
        return
    assert chosen(deltatune.get_peft_model, arch, our_config) == expected != []


@quiet
@pytest.mark.parametrize("method,arch", PAIRS)
def test_the_usual_layers_of_an_architecture(method, arch):
    their_config, our_config = configs(method, arch)
    expected = chosen(peft.get_peft_model, arch, their_config)
    assert chosen(deltatune.get_peft_model, arch, our_config) == expected != []
    assert set(our_config.target_modules) == set(their_config.target_modules)


@pytest.mark.parametrize("method", ["lora", "ia3", "oft", "hra"])
def test_the_table_of_usual_layers_is_pefts(method):
    name = {"lora": "LORA", "ia3": "IA3", "oft": "OFT", "hra": "HRA"}[method]
    table = getattr(peft.utils.constants, f"TRANSFORMERS_MODELS_TO_{name}_TARGET_MODULES_MAPPING")
    usual = deltatune.METHODS[deltatune.PeftType(name)].default_targets
    for model_type, expected in table.items():
        found = usual(model_type)
        assert found is not None, f"{model_type} is missing"
        targets = found["target_modules"] if isinstance(found, dict) else found
        assert (targets if isinstance(targets, str) else set(targets)) == (
            expected if isinstance(expected, str) else set(expected)
        ), model_type
        if method == "ia3":
            further = peft.utils.constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
            assert set(found["feedforward_modules"]) == set(further[model_type])


@quiet
@pytest.mark.parametrize("method,arch", PAIRS)
def test_the_printed_line_is_the_same(method, arch, capsys):
    their_config, our_config = configs(method, arch)
    peft.get_peft_model(tiny(arch), their_config).print_trainable_parameters()
    expected = capsys.readouterr().out
    deltatune.get_peft_model(tiny(arch), our_config).print_trainable_parameters()
    assert capsys.readouterr().out == expected and "trainable params" in expected


@quiet
@pytest.mark.parametrize("seed", range(6, 10))
@pytest.mark.parametrize("arch", ATTENTION)
def test_random_lora_options_adapt_the_same_layers(arch, seed):
    their_config, our_config = configs("lora", arch, **drawn(arch, seed))
    assert chosen(deltatune.get_peft_model, arch, our_config) == chosen(peft.get_peft_model, arch, their_config)


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_the_parameters_that_train_carry_the_same_names(arch):
    """Programs filter optimiser groups by them."""
    their_config, our_config = configs("lora", arch)
    expected = {name for name, p in theirs(arch, their_config).named_parameters() if p.requires_grad}
    ours = deltatune.get_peft_model(tiny(arch), our_config)
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == expected
