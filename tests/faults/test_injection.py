"""Adapters that cannot be put onto a model, and names (fault matrix, 18-30)."""

import json

import pytest
import torch
from torch import nn

from deltatune import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model, inject_adapter_in_model
from deltatune.adapter import Adapter
from deltatune.errors import (
    AdapterNameError,
    LimitError,
    NoMatchingPeftModuleError,
    OutOfMemoryError,
    PeftWarning,
    StateError,
    TargetError,
)
from deltatune.layer import AdaptedLayer
from tests.core.tiny import batch, logits, tiny
from tests.faults.folders import CONFIG, INPUTS, WEIGHTS, adapted, failing, refused, state, unchanged
from tests.laws.examples import move


def is_refused(kind, *words, arch="llama", **options):
    """By both ways of injecting, and onto a model that has an adapter; all as before, and a good one goes on after."""
    config = LoraConfig(**{"r": 2, **options})
    written = config.to_dict()
    base, model = tiny(arch), get_peft_model(tiny(arch), LoraConfig(r=2)).eval()
    before, models, outputs = state(base), state(model), logits(model, batch(arch))
    for call in (
        lambda: get_peft_model(base, config),
        lambda: inject_adapter_in_model(config, base),
        lambda: model.add_adapter("second", config),
    ):
        with refused(kind, *words):
            call()
    assert unchanged(base, before) and unchanged(model, models) and list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, batch(arch)), outputs) and config.to_dict() == written
    model.add_adapter("second", LoraConfig(r=2))


# 18-22 ---------------------------------------------------------------------------------------------------------------


def test_targets_that_are_not_there_are_answered_with_those_that_are():
    is_refused(NoMatchingPeftModuleError, "'q_porj'", "model.layers.0.self_attn.q_proj", target_modules=["q_porj"])
    is_refused(NoMatchingPeftModuleError, "nothing.*", "its layers are named like", target_modules="nothing.*")


def test_a_layer_that_no_method_takes_is_named_with_type_and_those_that_are_taken():
    is_refused(TargetError, "model.layers.0.mlp", "LlamaMLP", "Linear", "Embedding", target_modules=["mlp"])


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "nowhere"]},
        {"exclude_modules": ["nowhere"]},
        {"exclude_modules": "nowhere.*"},
        {"rank_pattern": {"nowhere": 3}},
        {"alpha_pattern": {"nowhere": 3}},
    ],
)
def test_a_dead_name_beside_live_ones_is_told_by_field_and_name(options):
    """PEFT says nothing; files of PEFT hold such names, so they are no error."""
    field = next(iter(options))
    with pytest.warns(PeftWarning, match=rf"{field}: .*nowhere"):
        get_peft_model(tiny("llama"), LoraConfig(**options))


def test_a_module_to_train_whole_that_is_not_there():
    is_refused(TargetError, "modules_to_save", "'nrom'", "norm", modules_to_save=["nrom"])


@pytest.mark.parametrize("layer", ["lm_head", "wte"])
def test_merging_into_a_tied_weight_leaves_the_other_end_right(layer):
    model = get_peft_model(tiny("gpt2"), LoraConfig(target_modules=[layer], r=2)).eval()
    move(model)
    inputs, other = batch("gpt2"), {"lm_head": "transformer.wte", "wte": "lm_head"}[layer]
    expected, weight = logits(model, inputs), model.get_base_model().get_submodule(other).weight.clone()
    with pytest.warns(PeftWarning, match="share|tied"):
        merged = model.merge_and_unload()
    assert torch.allclose(logits(merged, inputs), expected, atol=1e-4)
    assert torch.equal(merged.get_submodule(other).weight, weight)


# 23-26 ---------------------------------------------------------------------------------------------------------------

BAD = ["", ".", "..", "a/b", "/abs", "a\\b", "C:\\x", "a\0", "a\nb", "\x1b[31m", "x" * 65, "CON", "nul", "é", "a.b"]
BAD += ["LPT1", "__base__", "keys"]


@pytest.mark.parametrize("name", BAD, ids=[f"{name[:8]!a}" for name in BAD])
def test_a_name_that_could_be_a_path_is_refused_escaped_and_nothing_is_written(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, good = adapted(), adapted()
    before = state(model)
    good.save_pretrained(tmp_path / "good")
    files = sorted(tmp_path.rglob("*"))
    for call in (
        lambda: get_peft_model(tiny("llama"), LoraConfig(), adapter_name=name),
        lambda: model.add_adapter(name, LoraConfig()),
        lambda: model.load_adapter(tmp_path / "good", name),
        lambda: PeftModel.from_pretrained(tiny("llama"), tmp_path / "good", adapter_name=name),
        lambda: inject_adapter_in_model(LoraConfig(), tiny("llama"), adapter_name=name),
    ):
        with refused(AdapterNameError, repr(name)):
            call()
    assert unchanged(model, before) and sorted(tmp_path.rglob("*")) == files


@pytest.mark.parametrize("name", ["0", "layers", "self_attn", "q_proj", "lora_A", "weight", "model", "base_layer"])
def test_a_name_that_is_a_part_of_a_path_is_data(name, tmp_path):
    """PEFT saves half of the tensors of `default`, or none, when another adapter is called "0" or "layers"."""
    model = adapted(1)
    model.add_adapter(name, LoraConfig(r=3))
    move(model)
    expected = {}
    for one in ("default", name):
        model.set_adapter(one)
        expected[one] = logits(model, INPUTS)
    model.save_pretrained(tmp_path)
    for one, folder in (("default", tmp_path), (name, tmp_path / name)):
        assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), folder), INPUTS), expected[one])


def test_a_name_that_is_there_and_a_model_that_is_wrapped():
    model = adapted()
    before = state(model)
    with refused(StateError, "'default'", "delete_adapter"):
        model.add_adapter("default", IA3Config())
    for again in (model, model.get_base_model()):
        with refused(StateError, "already"):
            get_peft_model(again, LoraConfig())
    assert unchanged(model, before)


# 27, 29 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner,name", [(AdaptedLayer, "add"), (Adapter, "__init__")])
def test_an_injection_that_fails_at_the_kth_module_is_undone(monkeypatch, owner, name):
    class FaultError(Exception):
        pass

    failed = 0
    for at in range(40):
        base, model = tiny("llama"), adapted(7)
        before, models, outputs = state(base), state(model), logits(model, INPUTS)
        plain = [(path, id(module), type(module)) for path, module in base.named_modules()]
        ended = True
        for call in (
            lambda base=base: get_peft_model(base, LoraConfig(r=2, modules_to_save=["norm"])),
            lambda model=model: model.add_adapter("second", LoraConfig(r=2, modules_to_save=["norm"])),
        ):
            with failing(monkeypatch, owner, name, at, FaultError()):
                try:
                    call()
                except FaultError:
                    ended, failed = False, failed + 1
        if ended:
            break
        assert unchanged(base, before) and unchanged(model, models) and list(model.peft_config) == ["default"]
        assert [(path, id(module), type(module)) for path, module in base.named_modules()] == plain
        assert torch.equal(logits(model, INPUTS), outputs)
    assert ended and failed


OUT = [MemoryError("injected"), torch.OutOfMemoryError("injected"), RuntimeError("CPU: can't allocate memory")]


@pytest.mark.parametrize("error", OUT, ids=["python", "accelerator", "cpu"])
@pytest.mark.parametrize("config", [LoraConfig(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)])
def test_memory_that_runs_out_is_told_and_nothing_is_left(monkeypatch, error, config):
    model = tiny("llama")
    before = state(model)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Parameter, "__new__", lambda *_, **__: (_ for _ in ()).throw(error))
        with refused(OutOfMemoryError, "out of memory", "'default'", str(error)[:8], "smaller") as caught:
            get_peft_model(model, config)
    assert caught is None and issubclass(OutOfMemoryError, LimitError) and issubclass(OutOfMemoryError, MemoryError)
    assert unchanged(model, before)
    get_peft_model(model, config)


# 28, 30 --------------------------------------------------------------------------------------------------------------


def test_a_task_that_is_none_is_refused_with_those_that_are(tmp_path):
    with refused(Exception, "task_type='SEQ_CLASS'", "SEQ_CLS"):
        LoraConfig(task_type="SEQ_CLASS")
    adapted().save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**values, "task_type": "SEQ_CLASS"}))
    with refused(Exception, "SEQ_CLASS", str(tmp_path)):
        PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert (tmp_path / WEIGHTS).is_file()


@pytest.mark.parametrize(
    ("kind", "task", "words"),
    [
        ("llama", "SEQ_CLS", "LlamaForCausalLM has the head of CAUSAL_LM.*AutoModelForSequenceClassification"),
        ("t5", "TOKEN_CLS", "T5ForConditionalGeneration.*SEQ_2_SEQ_LM.*AutoModelForTokenClassification"),
        (
            "bert",
            "QUESTION_ANS",
            "BertForSequenceClassification .* head of SEQ_CLS.*AutoModelForQuestionAnswering",
        ),
        ("bert", "CAUSAL_LM", "BertForSequenceClassification has the head of SEQ_CLS.*AutoModelForCausalLM"),
    ],
)
def test_a_task_whose_head_the_model_lacks_is_told_by_task_and_class(kind, task, words):
    """PEFT trains on without the head, and says nothing."""
    with pytest.warns(PeftWarning, match=f"task_type='{task}', and {words}"):
        get_peft_model(tiny(kind), LoraConfig(task_type=task))


@pytest.mark.parametrize(
    ("kind", "task"),
    [("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM"), ("t5", "CAUSAL_LM"), ("llama", None),
     ("bert", "FEATURE_EXTRACTION")],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_a_task_that_fits_or_has_no_head_is_not_talked_about(kind, task):
    get_peft_model(tiny(kind), LoraConfig(task_type=task, target_modules="all-linear"))


def test_training_with_nothing_that_trains_is_refused_before_the_first_step():
    optim = pytest.importorskip("deltatune.train.optim", reason="training needs the extra 'cli'")
    model = adapted()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with refused(StateError, "no parameter of the model is trainable", "targets"):
        optim.build_optimizer(model, None)  # nothing else is looked at before
