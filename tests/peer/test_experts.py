"""LoRA on the parameters of experts, beside PEFT 0.21.2."""

import json
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import deltatune
from deltatune.errors import PeftError
from tests.core.moe import ARCHITECTURES, BOTH, READINGS, ids, moe
from tests.peer.crossing import EXACT
from tests.peer.pairs import loaded_by_peft, peft, saved_by_peft, scatter


def both(**options):
    arguments = {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": list(BOTH), **options}
    return peft.LoraConfig(**arguments), deltatune.LoraConfig(**arguments)


def of_peft(name, config, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        return scatter(peft.get_peft_model(moe(name, **changes), config), 3)


def logits(model):
    return model(input_ids=ids()).logits


def crosses_over(name, folder, reading=None, **options):
    their_config, our_config = both(**options)
    model = of_peft(name, their_config, reading=reading)
    expected = logits(model)
    ours = deltatune.PeftModel.from_pretrained(moe(name, reading=reading), saved_by_peft(model, folder / "theirs"))
    assert_close(logits(ours), expected, **EXACT)
    assert ours.get_nb_trainable_parameters()[1] == model.get_nb_trainable_parameters()[1]
    torch.manual_seed(5)
    made = scatter(deltatune.get_peft_model(moe(name, reading=reading), our_config), 11)
    made.save_pretrained(folder / "ours")
    assert_close(logits(loaded_by_peft(moe(name, reading=reading), folder / "ours")), logits(made), **EXACT)
    return model, ours


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_parameters(name, reading, tmp_path):
    crosses_over(name, tmp_path, reading)


OPTIONS = [
    {"target_parameters": ["experts.down_proj"]},
    {"target_parameters": ["experts.gate_up_proj"], "use_rslora": True},
    {"target_modules": ["q_proj", "o_proj"]},
    {"target_modules": None},
    {"rank_pattern": {r".*\.gate_up_proj": 3}, "alpha_pattern": {"down_proj": 7}},
    {"init_lora_weights": False, "target_parameters": ["gate_up_proj", "down_proj"]},
    {"init_lora_weights": "gaussian", "r": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options, tmp_path):
    crosses_over("mixtral", tmp_path, **options)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_routers_and_plain_layers_by_their_weights(name, tmp_path):
    crosses_over(name, tmp_path, target_parameters=["gate.weight", *BOTH])
    crosses_over(name, tmp_path, target_parameters=["q_proj.weight", "experts.down_proj"])


def test_merging(tmp_path):
    model, ours = crosses_over("gpt_oss", tmp_path)
    assert_close(logits(ours.merge_and_unload()), logits(model.merge_and_unload()), **EXACT)


def test_training_alike(tmp_path):
    model = of_peft("mixtral", both()[0])
    ours = deltatune.PeftModel.from_pretrained(moe("mixtral"), saved_by_peft(model, tmp_path), is_trainable=True)
    for each in (model, ours):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=3e-3)
        each.train()
        each.losses = []
        for seed in range(10):
            loss = each(input_ids=ids(3, seed % 3), labels=ids(3, seed % 3)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            each.losses.append(loss.item())
    assert ours.losses == pytest.approx(model.losses, abs=1e-4)


def test_several_adapters_of_one_model(tmp_path):
    model = of_peft("mixtral", both()[0])
    model.add_adapter("other", both(init_lora_weights=False)[0])
    folder = saved_by_peft(model, tmp_path)
    ours = deltatune.PeftModel.from_pretrained(moe("mixtral"), folder)
    ours.load_adapter(folder / "other", "other")
    for name in ("default", "other"):
        model.set_adapter(name)
        ours.set_adapter(name)
        assert_close(logits(ours), logits(model), **EXACT)
    ours.set_adapter(["default", "other"])
    model.base_model.set_adapter(["default", "other"])
    assert_close(logits(ours), logits(model), **EXACT)


class One(nn.Module):
    """A stack of one matrix, stored as (1, in, out)."""

    def __init__(self):
        super().__init__()
        self.is_transposed = True
        self.w = nn.Parameter(torch.randn(1, 6, 4))

    def forward(self, x):
        return x @ self.w[0]


def test_a_stack_of_one_turned_matrix():
    """PEFT adds (out, in) to (in, out) then."""
    their_config, our_config = both(target_parameters=["0.w"])
    with pytest.raises(RuntimeError):
        scatter(peft.get_peft_model(nn.Sequential(One()), their_config), 3)(torch.randn(2, 6))
    torch.manual_seed(0)
    ours = scatter(deltatune.get_peft_model(nn.Sequential(One()), our_config), 3)
    layer = ours.get_base_model()[0]
    part, x = layer.adapters["default"].each["w"], torch.randn(2, 6)
    expected = x @ (layer.base_layer.w[0] + 1.5 * (part.lora_B.weight @ part.lora_A.weight).T)
    assert_close(ours(x), expected)


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    folder = saved_by_peft(of_peft("mixtral", both()[0]), tmp_path)
    base = moe("mixtral", num_local_experts=6)
    with pytest.raises(PeftError):
        deltatune.PeftModel.from_pretrained(base, folder)
    assert not any("adapters" in name for name, _ in base.named_modules())
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "target_parameters": ["experts.down_proj"]}))
    with pytest.raises(PeftError, match=r"base_layer\.lora_A"):
        deltatune.PeftModel.from_pretrained(moe("mixtral"), folder)
