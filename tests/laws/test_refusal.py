"""A call that fails leaves model, files and list of adapters exactly as they were."""

import shutil

import pytest
import torch
from torch import nn

from deltatune import PeftModel, get_peft_model, inject_adapter_in_model
from deltatune.errors import FormatError, IntegrityError, MismatchError, PeftError, TargetError, UnsafeError
from tests.laws.examples import BASES, LAYER_METHODS, Case, Holder, config_of, move

METHODS = list(LAYER_METHODS)


class Deep(nn.Module):
    """Three layers that can be adapted, one that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Holder(nn.Linear(8, 8)) for _ in range(3)])
        self.bend = nn.Tanh()  # neither a layer nor a block of layers
        self.head = nn.Linear(8, 4)
        self.head.weight.requires_grad_(False)  # the flags of the user come back too

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.bend(x))


def picture(model: nn.Module):
    """Everything that a refused call could have changed."""
    return (
        [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    )


def deep() -> tuple[Deep, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Deep().eval(), torch.randn(3, 8)
    return model, x, model(x)


BAD = {
    "a target that is not there": {"target_modules": ["leyer"]},
    "a pattern that matches nothing": {"target_modules": r"nothing\..*"},
    "a layer that cannot be adapted": {"target_modules": ["layer", "bend"]},
    "everything excluded": {"exclude_modules": ["layer"]},
    "a module to save that is not there": {"modules_to_save": ["haed"]},
    "no such layer number": {"layers_to_transform": [7]},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", METHODS)
def test_a_config_that_does_not_fit_leaves_the_model_alone(name, bad):
    model, x, expected = deep()
    before, config = picture(model), config_of(name, **bad)
    written = config.to_dict()
    for call in (get_peft_model, lambda m, c: inject_adapter_in_model(c, m)):
        with pytest.raises(TargetError) as caught:
            call(model, config)
        assert "\n" not in str(caught.value) and caught.value.field is not None
        assert picture(model) == before and torch.equal(model(x), expected)
        assert config.to_dict() == written
    get_peft_model(model, config_of(name))  # and a good one works afterwards


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", METHODS)
def test_so_does_a_second_adapter_that_does_not_fit(name, bad):
    model, x, _ = deep()
    peft = get_peft_model(model, config_of(name))
    move(peft)
    before, expected = picture(peft), peft(x)
    with pytest.raises(TargetError):
        peft.add_adapter("other", config_of(name, **bad))
    assert picture(peft) == before and torch.equal(peft(x), expected)
    assert list(peft.peft_config) == ["default"] and peft.active_adapters == ["default"]


RANK = {name: config_of(name).rank_name for name in METHODS}
BOUNDED = [
    name for name in METHODS if LAYER_METHODS[name].adapter.bounded_r and RANK[name] in config_of(name).to_dict()
]


@pytest.mark.parametrize("name", BOUNDED)
def test_a_rank_beyond_the_layer_is_refused(name):
    model, x, expected = deep()
    before = picture(model)
    sizes = {key: 0 for key in config_of(name).to_dict() if key.endswith("_block_size")}
    rank = RANK[name]
    with pytest.raises(PeftError, match=f"{rank}=64") as caught:
        get_peft_model(model, config_of(name, **{rank: 64}, **sizes))
    assert caught.value.field == rank
    assert picture(model) == before and torch.equal(model(x), expected)


@pytest.mark.parametrize("k", range(3))
@pytest.mark.parametrize("name", METHODS)
def test_a_failure_at_the_kth_layer_is_rolled_back(name, k, monkeypatch):
    kind = LAYER_METHODS[name].adapter
    model, x, expected = deep()
    before, build, count = picture(model), kind.build, iter(range(99))

    def failing(*arguments):
        if next(count) == k:
            raise MemoryError("injected")
        return build(*arguments)

    monkeypatch.setattr(kind, "build", failing)
    with pytest.raises(MemoryError):
        get_peft_model(model, config_of(name))
    assert picture(model) == before and torch.equal(model(x), expected)
    monkeypatch.undo()

    from deltatune.layer import AdaptedLayer

    wrap, count = AdaptedLayer.add, iter(range(99))

    def wrapping(self, *args):
        wrap(self, *args)
        if next(count) == k:
            raise MemoryError("injected")

    monkeypatch.setattr(AdaptedLayer, "add", wrapping)
    with pytest.raises(MemoryError):
        get_peft_model(model, config_of(name))
    assert picture(model) == before and torch.equal(model(x), expected)


# ----------------------------------------------------------------------------------------------------------- folders


def flip_a_bit(folder):
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


def truncate(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def remove_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


def remove_config(folder):
    (folder / "adapter_config.json").unlink()


def cut_config(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LO')


def rename_keys(folder):
    rewrite(folder, lambda tensors: {f"{key}s": value for key, value in tensors.items()})


def drop_a_key(folder):
    rewrite(folder, lambda tensors: dict(list(tensors.items())[:-1]))


def not_finite(folder):
    rewrite(folder, lambda tensors: {key: value * float("nan") for key, value in tensors.items()})


def wrong_shape(folder):
    rewrite(folder, lambda tensors: {key: torch.cat([value, value]) for key, value in tensors.items()})


def attack_the_base(folder):
    rewrite(folder, lambda tensors: {**tensors, "base_model.model.neighbour.weight": torch.zeros(3, 3)})


def rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


DAMAGE = {
    flip_a_bit: IntegrityError,
    truncate: FormatError,
    remove_weights: FormatError,
    remove_config: FormatError,
    cut_config: FormatError,
    rename_keys: MismatchError,
    drop_a_key: MismatchError,
    not_finite: MismatchError,
    wrong_shape: MismatchError,
    attack_the_base: UnsafeError,
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", METHODS)
def test_a_damaged_folder_changes_nothing(name, damage, tmp_path):
    case = Case(name, "default", "linear")
    good = case.model()
    x = case.batch()
    expected = good(x)
    good.save_pretrained(tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    damage(tmp_path / "bad")

    torch.manual_seed(0)
    base = Holder(BASES["linear"].make()).eval()
    before, plain = picture(base), base(x)
    with pytest.raises(DAMAGE[damage]) as caught:
        PeftModel.from_pretrained(base, tmp_path / "bad")
    assert "\n" not in str(caught.value) and "bad" in str(caught.value)
    assert picture(base) == before and torch.equal(base(x), plain)

    before = picture(good)
    with pytest.raises(DAMAGE[damage]):
        good.load_adapter(tmp_path / "bad", "second")
    assert picture(good) == before and torch.equal(good(x), expected) and list(good.peft_config) == ["default"]
    with pytest.raises(DAMAGE[damage]):
        good.load_adapter(tmp_path / "bad", "default")
    assert picture(good) == before and torch.equal(good(x), expected)
    good.load_adapter(tmp_path / "good", "second")  # the name is free
    good.set_adapter("second")
    assert torch.equal(good(x), expected)


@pytest.mark.parametrize("name", METHODS)
def test_the_folder_of_another_base_is_refused(name, tmp_path):
    case = Case(name, "default", "linear")
    model = case.model()
    model.save_pretrained(tmp_path)
    torch.manual_seed(7)
    other = Holder(BASES["linear"].make()).eval()
    before = picture(other)
    with pytest.raises(MismatchError, match="another base model"):
        PeftModel.from_pretrained(other, tmp_path)
    assert picture(other) == before
    try:
        PeftModel.from_pretrained(other, tmp_path, allow_base_mismatch=True)
    except MismatchError as error:  # sizes may follow from the base, and then no permission makes them fit
        assert "has shape" in str(error) and model.get_base_model().layer.adapters["default"].derived_tensors()
        assert picture(other) == before
