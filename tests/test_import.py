"""Importing deltatune costs torch and nothing else."""

import subprocess
import sys

HEAVY = ("transformers", "accelerate", "datasets", "huggingface_hub", "tokenizers", "pydantic", "typer", "rich", "yaml")


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_torch_and_nothing_heavier():
    code = f"import torch, sys, deltatune; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert run(code) == "[]"


# Parts that LoRA on a model has no use for before something is saved, loaded or combined.
LATER = (
    *("deltatune.combine.weighted", "deltatune.combine.convert", "deltatune.loading", "deltatune.storage.folder"),
    *("deltatune.prompts.key_values", "deltatune.prompts.attention", "deltatune.inputs.stage", "deltatune.inputs.rows"),
    *("safetensors", "deltatune.lora.convert", "deltatune.fused.export"),
)


def test_the_first_names_load_no_part_that_they_do_not_need():
    names = "from deltatune import LoraConfig, PeftModel, get_peft_model"
    found = run(f"import torch, sys; {names}; print([name for name in {(*HEAVY, *LATER)!r} if name in sys.modules])")
    assert found == "[]"


def test_a_lora_model_runs_without_what_prompts_bring():
    code = """
import torch, sys, deltatune
config = deltatune.LoraConfig(r=2, target_modules=["0"], alora_invocation_tokens=None)
model = deltatune.get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config)
model(torch.randn(2, 6), adapter_names=["default", "__base__"])
assert model.prefixes == {}
print([name for name in sys.modules if name.startswith(("deltatune.prompts.k", "deltatune.inputs."))])
"""
    assert run(code) == "[]"


def test_a_plain_module_is_adapted_saved_and_loaded_without_transformers(tmp_path):
    """The packages of the extras are hidden: only torch and safetensors may be needed."""
    code = f"""
import sys
for name in {HEAVY!r}:
    sys.modules[name] = None
import torch, deltatune
make = lambda: torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
torch.manual_seed(0)
base = make()
state = {{k: v.clone() for k, v in base.state_dict().items()}}
model = deltatune.get_peft_model(base, deltatune.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
x = torch.randn(4, 6)
model.save_pretrained({str(tmp_path)!r})
again = make()
again.load_state_dict(state)
loaded = deltatune.PeftModel.from_pretrained(again, {str(tmp_path)!r})
assert torch.equal(model(x), loaded(x)) and not torch.equal(model(x), make()(x))
print("same")
"""
    assert run(code) == "same"


def test_every_public_name_is_there():
    import deltatune

    missing = [name for name in deltatune.__all__ if getattr(deltatune, name, None) is None]
    assert missing == []


def test_the_version_is_the_one_of_the_package():
    from importlib.metadata import version

    import deltatune

    assert deltatune.__version__ == version("deltatune")
