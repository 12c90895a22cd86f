"""What several layers share: held once at the model's root, and the public way for a method of another package."""

import copy
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from deltatune import METHODS, Adapter, Method, PeftModel, Stored, get_model_status, get_peft_model, register_method
from deltatune.config import config
from deltatune.errors import MismatchError, StateError
from deltatune.functional import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from deltatune.methods.common import LayerConfig
from deltatune.storage.derived import check_derived, checksums


@config
class TiedConfig(LayerConfig):
    seed: int = 0

    def __post_init__(self) -> None:
        self.peft_type = "TIED"
        super().__post_init__()


class Knob(Stored):
    """One number for the whole model, and a frozen direction that the seed gives."""

    def __init__(self, layers, config) -> None:
        super().__init__()
        self.tied_number = nn.Parameter(torch.zeros(1))
        generator = torch.Generator().manual_seed(config.seed)
        self.register_buffer("tied_frozen", torch.randn(9, generator=generator), persistent=False)
        self.paths = list(layers)

    def derived_tensors(self) -> dict[str, Tensor]:
        return {"tied_frozen": self.tied_frozen}


class Tied(Adapter):
    """W' = W + s u 1^T."""

    @classmethod
    def build(cls, layer, config, path, shared):
        assert path in shared.paths
        return cls()

    def adapt(self, weight):
        return weight + self.shared.tied_number * self.shared.tied_frozen[: len(weight), None]


@pytest.fixture(autouse=True)
def tied() -> Iterator[Method]:
    yield register_method(Method("TIED", TiedConfig, Tied, key_prefix="tied_", shared=Knob))
    del METHODS["TIED"]


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 9)
        self.again = self.first

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def base(seed: int = 0) -> Three:
    torch.manual_seed(seed)
    return Three()


def adapted(value: float = 0.7, seed: int = 0) -> PeftModel:
    model = get_peft_model(base(), TiedConfig(target_modules=["first", "second", "again"], seed=seed))
    nn.init.constant_(knob(model).tied_number, value)
    return model


def knob(model: PeftModel, name: str = "default") -> Knob:
    return model.get_base_model().shared_by_adapters[name]


X = torch.linspace(-1, 1, 20).reshape(5, 4)


def test_each_tensor_is_seen_once_and_trains():
    model = adapted()
    assert knob(model).paths == ["first", "second"], "one layer under two names is one"
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names == ["base_model.model.shared_by_adapters.default.tied_number"]
    assert [key for key in model.state_dict() if "tied" in key] == names, "what can be derived stays out"
    assert model.get_nb_trainable_parameters()[0] == 1
    model(X).sum().backward()
    both = knob(model).tied_number.grad.clone()
    assert both.abs() > 0
    status = get_model_status(model)
    assert status.requires_grad == {"default": True} and status.devices == {"default": ["cpu"]}
    model.set_adapter("default", inference_mode=True)
    assert not knob(model).tied_number.requires_grad


def test_a_copy_keeps_its_layers_on_its_own_shared_module():
    model = adapted()
    made = copy.deepcopy(model)
    assert made.get_base_model().first.adapters["default"].shared is knob(made) is not knob(model)
    nn.init.constant_(knob(made).tied_number, 3.0)
    assert not torch.allclose(made(X), model(X))
    made.double()
    assert knob(made).tied_frozen.dtype == torch.float64, "it moves with the model"


def test_files_have_it_at_the_top_and_leave_out_what_can_be_derived(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == ["base_model.tied_number"]
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path)(X), model(X))
    with pytest.raises(MismatchError, match="tied_frozen, derived here"):
        PeftModel.from_pretrained(base(), tmp_path, config=TiedConfig(target_modules=["first", "second"], seed=1))


def test_a_failed_load_takes_it_off_again(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = base()
    with pytest.raises(MismatchError):
        PeftModel.from_pretrained(model, tmp_path, config=TiedConfig(target_modules=["first", "second"], seed=1))
    assert list(model._modules) == ["first", "second", "again"] and type(model.first) is nn.Linear


def test_adapters_come_and_go_by_name():
    model = adapted()
    model.add_adapter("other", TiedConfig(target_modules=["second"]))
    assert list(model.get_base_model().shared_by_adapters) == ["default", "other"]
    assert not knob(model, "other").tied_number.requires_grad
    model.set_adapter("other")
    assert knob(model, "other").tied_number.requires_grad and not knob(model).tied_number.requires_grad
    model.delete_adapter("default")
    assert list(model.get_base_model().shared_by_adapters) == ["other"]
    assert list(model.merge_and_unload()._modules) == ["first", "second", "again"]


def test_without_a_peft_model_and_into_one():
    model = inject_adapter_in_model(TiedConfig(target_modules=["first", "second"]), base())
    nn.init.constant_(model.shared_by_adapters["default"].tied_number, 0.7)
    tensors = get_peft_model_state_dict(model)
    assert list(tensors) == ["tied_number"]
    wrapped = adapted(value=0.0)
    assert set_peft_model_state_dict(wrapped, tensors) == ([], [])
    assert torch.equal(wrapped(X), model(X))
    nn.init.zeros_(model.shared_by_adapters["default"].tied_number)
    assert set_peft_model_state_dict(model, get_peft_model_state_dict(wrapped)) == ([], [])
    assert torch.equal(wrapped(X), model(X))


def test_derived_tensors_that_are_given_are_used_and_saved_again(tmp_path):
    model = adapted()
    given = {"base_model.tied_number": torch.ones(1), "base_model.tied_frozen": torch.arange(9.0)}
    assert set_peft_model_state_dict(model, given) == ([], [])
    assert torch.equal(knob(model).tied_frozen, torch.arange(9.0))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(loaded(X), model(X)) and torch.equal(knob(loaded).tied_frozen, torch.arange(9.0))


def test_a_model_that_uses_the_name_itself_is_refused():
    model = base()
    model.shared_by_adapters = nn.Linear(2, 2)
    with pytest.raises(StateError, match="of its own"):
        get_peft_model(model, TiedConfig(target_modules=["first"]))
    assert type(model.first) is nn.Linear


@pytest.mark.parametrize("shape", [(7,), (40, 30), (3, 4, 5)])
def test_checksums_bear_last_digits_and_notice_other_tensors(shape):
    torch.manual_seed(0)
    tensor = torch.randn(shape)
    saved = checksums([("t", tensor), ("u", tensor * 0)])
    for harmless in (tensor * (1 + 1e-5), tensor.bfloat16(), tensor + 1e-5 * torch.randn(shape)):
        check_derived(saved, iter([("t", harmless), ("u", tensor * 0)]), "file")
    sign = tensor.clone()
    sign[0] *= -1
    for other in (torch.randn(shape), tensor.flip(0), sign, 1.1 * tensor, -tensor):
        with pytest.raises(MismatchError, match="file: t, derived"):
            check_derived(saved, iter([("t", other), ("u", tensor * 0)]), "file")
    for damaged in ({}, {"t": "no"}, {"t": [0.0]}, {"t": ["a"] * 5}, None, 3):
        with pytest.raises(MismatchError):
            check_derived(damaged, iter([("t", tensor)]), "file")
