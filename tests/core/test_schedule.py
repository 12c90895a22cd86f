"""The penalty of a training step, and `after_step`: in a loop of one's own, in the Trainer, in `deltatune.train`."""

import json
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from deltatune import AdaLoraConfig, AdapterCallback, LoraConfig, get_peft_model
from deltatune.errors import PeftWarning
from tests.core.tiny import batch, tiny

SIZES = {"init_r": 4, "target_r": 2, "total_step": 8, "tfinal": 2, "target_modules": ["q_proj", "v_proj"]}


def made(**options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(tiny("llama"), AdaLoraConfig(**{"task_type": "CAUSAL_LM", **SIZES, **options}))


def optimizer_of(model: nn.Module, kind: Any = torch.optim.AdamW, **options: Any) -> Any:
    return kind([p for p in model.parameters() if p.requires_grad], lr=1e-2, **options)


def test_the_penalty_is_in_the_loss_of_a_training_pass_and_of_no_other():
    model, inputs = made(), batch("llama")
    plain = model.get_base_model()(**inputs).loss
    term = model.penalty()
    assert term > 0.1
    model.train()
    torch.testing.assert_close(model(**inputs).loss, plain + term)
    assert model(**inputs)["loss"] is not None and torch.equal(model(**inputs)[0], model(**inputs).loss)
    torch.testing.assert_close(model(**inputs, return_dict=False)[0], plain + term)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).loss, plain)
    with model.disable_adapter():
        torch.testing.assert_close(model(**inputs).loss, plain)
    model.eval()
    torch.testing.assert_close(model(**inputs).loss, plain)


def test_the_penalties_of_the_active_adapters_that_train_are_summed():
    model = made()
    torch.manual_seed(1)
    model.add_adapter("other", AdaLoraConfig(task_type="CAUSAL_LM", **SIZES))
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["q_proj"]))
    one = model.penalty()
    model.set_adapter("other")
    two = model.penalty()
    model.set_adapter(["default", "other", "lora"])
    torch.testing.assert_close(model.penalty(), one + two)
    model.set_requires_grad("other", False)
    torch.testing.assert_close(model.penalty(), one)
    model.set_adapter("lora")
    assert model.penalty() is None


def test_a_row_of_a_mixed_batch_brings_its_adapters_penalty():
    model, inputs = made(), batch("llama")
    plain = model.get_base_model()(**inputs).loss
    model.train()
    loss = model(**inputs, adapter_names=["default", "__base__"]).loss
    torch.testing.assert_close(loss, plain + model.penalty())
    torch.testing.assert_close(model(**inputs, adapter_names=["__base__", "__base__"]).loss, plain)


def test_under_autocast_the_penalty_keeps_its_precision():
    model = made().train()
    exact = model.penalty()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.penalty(), exact)


def own_loop(model: Any, steps: int, call: bool, optimizer: Any = None) -> None:
    model.train()
    optimizer = optimizer or optimizer_of(model)
    for step in range(steps):
        model(**batch("llama", seed=step)).loss.backward()
        optimizer.step()
        if call:
            model.after_step()
        optimizer.zero_grad()


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_loop_that_forgets_the_schedule_is_told_once(options):
    model = made()
    with pytest.warns(PeftWarning, match=r"'default' \(ADALORA\).*3 optimizer steps.*model.after_step\(\)") as caught:
        own_loop(model, 8, call=False, optimizer=optimizer_of(model, **options))
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_loops_that_call_it_or_do_not_train_or_have_no_schedule_are_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own_loop(made(), 8, call=True)
        own_loop(get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"])), 5, call=False)
        model = made().train()
        for step in range(6):  # gradients are accumulated
            model(**batch("llama", seed=step)).loss.backward()
        model.eval()
        for step in range(6):
            model(**batch("llama", seed=step))


def test_a_loop_with_a_loss_of_its_own_is_told_to_add_the_penalty():
    model = made().train()
    inputs = {k: v for k, v in batch("llama").items() if k != "labels"}
    optimizer = optimizer_of(model)
    model(**inputs).logits.square().mean().backward()
    with pytest.warns(PeftWarning, match=r"add model.penalty\(\) to your own loss"):
        model.after_step()
    optimizer.zero_grad()
    (model(**inputs).logits.square().mean() + model.penalty()).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.after_step()


def test_pefts_name_sets_the_step():
    model = made().train()
    model(**batch("llama")).loss.backward()
    model.base_model.update_and_allocate(6)
    assert model.base_model.schedules["default"].step == 6
    assert model.peft_config["default"].rank_pattern is not None


class Small(nn.Module):
    """One layer, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 6)

    def forward(self, x: Any) -> Any:
        return self.layer(x).square().mean(), self.layer(x)


def test_a_compiled_training_step_has_the_penalty():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = get_peft_model(Small(), AdaLoraConfig(init_r=4, target_r=2, target_modules=["layer"], total_step=9)).train()
    x = torch.randn(3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = torch.compile(model, backend="aot_eager")(x)[0]
    torch.testing.assert_close(loss, model(x)[0])
    torch.testing.assert_close(loss, model.get_base_model()(x)[0] + model.penalty())
    torch._dynamo.reset()


def test_a_deleted_adapter_has_no_schedule():
    model = made()
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    model.set_adapter("other")
    model.delete_adapter("default")
    assert not model.base_model.schedules
    model.after_step()


@dataclass
class Rows(torch.utils.data.Dataset):
    count: int = 16

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: value[1] for key, value in batch("llama", seed=index).items()}


def trainer(model: Any, folder: Any, callback: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, max_steps=8,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback] if callback else [])


def test_the_trainer_runs_the_schedule_through_the_callback(tmp_path):
    model = made()
    trainer(model, tmp_path, AdapterCallback()).train()
    assert model.base_model.schedules["default"].step == 8
    pattern = model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 2 * len(pattern)
    with pytest.warns(PeftWarning, match="follows a schedule"):
        trainer(made(), tmp_path, None).train()


def test_the_trainers_checkpoint_holds_the_schedule(tmp_path):
    """Whole models are what the Trainer saves of ours, so the test keeps weights, optimizer and place itself."""

    class State:
        global_step, is_world_process_zero = 4, True

    class Arguments:
        output_dir = str(tmp_path)

    one = made()
    own_loop(one, 4, call=True)
    (tmp_path / "checkpoint-4").mkdir()
    AdapterCallback().on_save(Arguments, State, None, model=one)
    assert json.loads((tmp_path / "checkpoint-4/adapter_schedule.json").read_text())["default"]["step"] == 4
    other = made()
    AdapterCallback().on_train_begin(Arguments, State, None, model=other)
    left, right = (model.base_model.schedules["default"] for model in (one, other))
    assert right.step == 4
    assert all(torch.equal(left.sensitivity.mean[k], right.sensitivity.mean[k]) for k in left.sensitivity.mean)

    third = made()
    with pytest.warns(PeftWarning, match="goes on from step 4 with fresh sensitivities"):
        AdapterCallback(checkpoint=tmp_path / "nowhere").on_train_begin(Arguments, State, None, model=third)
    assert third.base_model.schedules["default"].step == 4
