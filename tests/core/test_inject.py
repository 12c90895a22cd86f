"""A plain module can be adapted without a `PeftModel`, and without transformers."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import deltatune
from deltatune import LoraConfig, inject_adapter_in_model
from deltatune.errors import ConfigError, PeftError, StateError
from deltatune.layer import AdaptedLayer
from tests.laws.examples import move


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_plain_module_is_adapted_saved_and_loaded_where_transformers_cannot_be_imported(tmp_path):
    out = run_python(f"""
        import sys

        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("transformers", "accelerate", "huggingface_hub", "tokenizers", "datasets"):
                    raise ModuleNotFoundError(f"{{name}} is not installed here")

        sys.meta_path.insert(0, Refuse())
        import torch
        from torch import nn
        from deltatune import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

        def base():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))

        model = inject_adapter_in_model(LoraConfig(target_modules=["0", "2"], r=2), base())
        assert type(model) is nn.Sequential
        model(torch.randn(3, 6)).sum().backward()
        assert all((p.grad is not None) == ("lora" in name) for name, p in model.named_parameters())
        model = get_peft_model(base(), LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
        model.print_trainable_parameters()
        model.save_pretrained({str(tmp_path)!r})
        loaded = PeftModel.from_pretrained(base(), {str(tmp_path)!r})
        x = torch.randn(3, 6)
        assert torch.equal(loaded(x), model(x))
        assert "transformers" not in sys.modules
    """)
    assert out.startswith("trainable params: 22 || all params: 81")


def test_importing_the_package_imports_torch_and_nothing_heavier():
    out = run_python("""
        import sys
        import torch
        before = set(sys.modules)
        import deltatune
        print(sorted({name.split(".")[0] for name in set(sys.modules) - before}))
    """)
    assert out.strip() == "['deltatune']"


@pytest.mark.parametrize("name", deltatune.__all__)
def test_every_public_name_is_there(name):
    assert getattr(deltatune, name) is not None and name in dir(deltatune)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def test_a_second_adapter_shares_the_choice_with_the_first():
    config = LoraConfig(target_modules=["0", "2"], r=2)
    adapted = inject_adapter_in_model(config, model())
    inject_adapter_in_model(LoraConfig(target_modules=["2"], r=3), adapted, "other")
    assert adapted[0].selection is adapted[2].selection and set(adapted[2].adapters) == {"default", "other"}
    assert adapted[2].selection.active == ("other",)  # the newest, as in PEFT
    trains = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trains and all(".other." in name for name in trains)
    with pytest.raises(StateError, match="named 'other' already"):
        inject_adapter_in_model(config, adapted, "other")


def test_tensors_can_be_given_at_once():
    config = LoraConfig(target_modules=["0", "2"], r=2)
    first = inject_adapter_in_model(config, model())
    move(first)
    tensors = deltatune.get_peft_model_state_dict(first)
    assert set(tensors) == {f"{layer}.lora_{ab}.weight" for layer in (0, 2) for ab in "AB"}
    second = inject_adapter_in_model(config, model(), state_dict=tensors)
    x = torch.randn(3, 6)
    assert torch.equal(second(x), first(x)) and isinstance(second[0], AdaptedLayer)


def test_a_method_of_whole_models_is_refused():
    with pytest.raises(ConfigError, match="PREFIX_TUNING acts outside of single layers"):
        inject_adapter_in_model(deltatune.PrefixTuningConfig(num_virtual_tokens=2), model())


def test_a_state_dict_that_does_not_fit_leaves_the_model_bare():
    bare = model()
    flags = [parameter.requires_grad for parameter in bare.parameters()]
    names = [name for name, _ in bare.named_modules()]
    tensors = deltatune.get_peft_model_state_dict(
        inject_adapter_in_model(LoraConfig(target_modules=["0"], r=2), model())
    )
    with pytest.raises(PeftError, match="shape"):
        inject_adapter_in_model(LoraConfig(target_modules=["0"], r=3), bare, state_dict=tensors)
    assert [name for name, _ in bare.named_modules()] == names
    assert [parameter.requires_grad for parameter in bare.parameters()] == flags
