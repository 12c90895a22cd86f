"""Candidates in one pass: each ends where its lone run ends."""

import pytest
import torch

from deltatune.compare.one_pass import load
from deltatune.compare.together import Together, shared_settings, why_alone
from deltatune.compare.trial import why_not
from deltatune.train import TrainSettings, train

SIX = [
    {"method": "lora", "r": 2},
    {"method": "lora", "r": 4, "learning_rate": 1e-3},
    {"method": "lora", "r": 4, "lora_alpha": 3, "weight_decay": 0.1, "optimizer": "loraplus"},
    {"method": "ia3", "max_grad_norm": 0.05},
    {"method": "loha", "r": 2, "lr_scheduler_type": "linear", "warmup_steps": 2},
    {"method": "prefix_tuning", "num_virtual_tokens": 3},
]


def settings_of(shared, tmp_path, number, **own):
    quiet = {
        "eval_before": False,
        "num_scored": 0,
        "num_samples": 0,
        "eval_steps": 0,
        "save_steps": 0,
        "lora_dropout": 0,
    }
    if own["method"] != "lora":
        quiet.pop("lora_dropout")
    return TrainSettings(
        **{**shared, **quiet, "task": shared.get("task", "seq2seq"), **own, "output_dir": str(tmp_path / str(number))}
    )


def together(settings):
    base, corpus, device = load(settings[0])
    return Together(base.model, corpus, settings, device)


def trained(model, name):
    """The tensors of an adapter by where they are."""
    from deltatune import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=name)


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_each_candidate_equals_its_lone_run(shared, tmp_path, accumulate):
    shared = {
        **shared,
        "max_steps": 13,
        "learning_rate": 3e-3,
        "gradient_accumulation_steps": accumulate,
    }  # into the second epoch
    settings = [settings_of(shared, tmp_path, i, **own) for i, own in enumerate(SIX)]
    assert len({shared_settings(one) for one in settings}) == 1 and not any(why_alone(one) for one in settings)
    run = together(settings)
    assert why_not(run, must_gain=False) is None
    run.train()
    for member, own in zip(run.members, settings):
        lone = train(own)
        assert lone.metrics["total_parameters"] == run.counts[run.members.index(member)]
        wanted, got = trained(lone.model, "default"), trained(run.model, member.name)
        assert wanted.keys() == got.keys() and wanted
        for key, tensor in wanted.items():
            assert (got[key] - tensor).abs().max() <= 1e-5, (own.method, key)


def test_heads_of_a_classifier_are_each_candidates_own(shared, tiny, tmp_path):
    classes = {name: value for name, value in shared.items() if name != "test_file"}
    classes |= {"model_name_or_path": str(tiny / "bert"), "train_file": str(tiny / "labelled.jsonl"), "eval_split": 0.2}
    classes["task"] = "classification"
    settings = [settings_of(classes, tmp_path, i, **own) for i, own in enumerate(SIX[:4:3])]
    run = together(settings)
    assert why_not(run, must_gain=False) is None
    run.train()
    for member, own in zip(run.members, settings):
        wanted, got = trained(train(own).model, "default"), trained(run.model, member.name)
        assert any("classifier" in key for key in wanted)
        for key, tensor in wanted.items():
            assert (got[key] - tensor).abs().max() <= 1e-5, (own.method, key)


def test_a_candidate_whose_numbers_break_is_dropped_and_the_others_go_on(shared, tmp_path):
    calm = settings_of(shared, tmp_path, 0, **SIX[0])
    wild = settings_of(shared, tmp_path, 1, **{**SIX[1], "r": 8})
    run = together([calm, wild])
    with torch.no_grad():
        run.members[1].parameters[0].fill_(float("nan"))
    run.train()
    assert "not finite at step 1" in run.members[1].failed and run.members[0].failed is None
    wanted, got = trained(train(calm).model, "default"), trained(run.model, run.members[0].name)
    assert all((got[key] - tensor).abs().max() <= 1e-5 for key, tensor in wanted.items())


def test_a_pass_that_is_not_the_lone_one_is_found_out(shared, tmp_path):
    run = together([settings_of(shared, tmp_path, i, **own) for i, own in enumerate(SIX[:2])])
    true = run.loss
    run.loss = lambda rows, names: true(rows, names) / len(names)  # the mean, where the sum is meant
    assert "gradients of lora" in why_not(run, must_gain=False)
    run.loss = true
    before = [parameter.clone() for member in run.members for parameter in member.parameters]
    assert why_not(run, must_gain=False) is None
    after = [parameter for member in run.members for parameter in member.parameters]
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_one_that_differs_by_a_kink_of_the_model_alone_is_not_held_against_the_pass(shared, tmp_path):
    run = together([settings_of(shared, tmp_path, i, **own) for i, own in enumerate(SIX[:2])])
    true, calls = run.loss, []

    def kinked(rows, names):  # where these adapters stand, an input of a ReLU is zero but for rounding
        calls.append(names)
        return true(rows, names) * (1.5 if len(calls) == 1 else 1)

    run.loss = kinked
    assert why_not(run, must_gain=False) is None
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("own", "why"),
    [
        ({"method": "full"}, "trains the base"),
        ({"method": "adalora", "init_r": 4, "target_r": 2}, "schedule"),
        ({"method": "lora", "init_lora_weights": "pissa"}, "start"),
        ({"method": "prompt_tuning"}, "not on the layers"),
        ({"method": "lora", "optimizer": "lorafa"}, "lorafa"),
    ],
)
def test_what_has_to_run_alone_says_why(shared, tmp_path, own, why):
    assert why in why_alone(
        settings_of(shared, tmp_path, 0, **{"lora_dropout": 0, **own} if own["method"] == "lora" else own)
    )
