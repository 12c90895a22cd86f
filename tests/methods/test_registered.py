"""A method of another package: one public call, and it trains, saves, loads and answers like any other."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from deltatune import METHODS, Adapter, Method, PeftModel, get_peft_config, get_peft_model, register_method
from deltatune.config import config
from deltatune.errors import ConfigError
from deltatune.methods.common import LayerConfig
from deltatune.train.defaults import learning_rate, peft_type
from deltatune.train.method import method_names


@config
class ShiftConfig(LayerConfig):
    size: int = 1

    def __post_init__(self) -> None:
        self.peft_type = "SHIFT"
        super().__post_init__()


class Shift(Adapter):
    """W' = W + s, one number for all."""

    def __init__(self) -> None:
        super().__init__()
        self.shift_s = nn.Parameter(torch.zeros(1))

    @classmethod
    def build(cls, layer, config, path):
        return cls()

    def adapt(self, weight):
        return weight + self.shift_s


@pytest.fixture
def shift() -> Iterator[Method]:
    yield register_method(Method("SHIFT", ShiftConfig, Shift, key_prefix="shift_", learning_rate=0.5))
    del METHODS["SHIFT"]


def test_it_goes_through_every_verb(shift, tmp_path):
    torch.manual_seed(0)
    base = nn.ModuleDict({"layer": nn.Linear(4, 3)})
    layer = base["layer"]
    model = get_peft_model(base, ShiftConfig(target_modules=["layer"]))
    nn.init.constant_(model.get_base_model()["layer"].adapters["default"].shift_s, 2.0)
    x = torch.randn(5, 4)
    expected = model.get_base_model()["layer"](x)
    torch.testing.assert_close(expected, nn.functional.linear(x, layer.weight + 2, layer.bias))
    model.save_pretrained(tmp_path)
    fresh = nn.ModuleDict({"layer": nn.Linear(4, 3)})
    fresh["layer"].load_state_dict(layer.state_dict())
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(loaded.get_base_model()["layer"](x), expected)
    assert get_peft_config({"peft_type": "SHIFT", "size": 3}).size == 3
    assert "shift" in method_names() and learning_rate("shift", {}) == 0.5 and peft_type("shift") == "SHIFT"


def test_a_name_that_is_taken_or_not_upper_case_is_refused(shift):
    with pytest.raises(ConfigError, match="'LORA' is a method already"):
        register_method(Method("LORA", ShiftConfig, Shift, key_prefix="shift_"))
    with pytest.raises(ConfigError, match="use 'MY_SHIFT'"):
        register_method(Method("my_shift", ShiftConfig, Shift, key_prefix="shift_"))
    assert METHODS["LORA"].adapter is not Shift
