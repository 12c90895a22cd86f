"""Methods that rotate, beside PEFT 0.21.2: RoAd, BOFT, OFT, PSOFT, DEFT."""

import random

import pytest

import deltatune
from tests.core.tiny import TASKS
from tests.peer import crossing
from tests.peer.pairs import ATTENTION, peft

KINDS = ("RoadConfig",)
quiet = pytest.mark.filterwarnings("ignore:.*match no module:deltatune.PeftWarning")


def both(kind, arch, **options):
    """PEFT's config and ours from the same arguments."""
    arguments = {"task_type": TASKS[arch], **options}
    return getattr(peft, kind)(**arguments), getattr(deltatune, kind)(**arguments)


def crosses_over(kind, arch, folder, back=True, **options):
    return crossing.crosses_over(*both(kind, arch, **options), arch, folder, back=back)


def trains_alike(kind, arch, folder, **options):
    crossing.trains_alike(both(kind, arch, **options)[0], arch, folder)


def some_layers(arch, draw):
    return sorted(draw.sample(ATTENTION[arch], draw.randint(1, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_fields_and_defaults_are_pefts(kind):
    ours, theirs = getattr(deltatune, kind)().to_dict(), getattr(peft, kind)().to_dict()
    beyond = getattr(deltatune, kind).beyond_peer | getattr(deltatune, kind).unsaved
    differing = {key: (ours.get(key), value) for key, value in theirs.items() if key not in ours or ours[key] != value}
    assert differing == {} and set(ours) - set(theirs) == beyond


# ---------------------------------------------------------------------------------------------------------------- RoAd


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("arch", ["llama", "bert", "t5"])
def test_road(arch, seed, tmp_path):
    draw = random.Random(f"road{arch}{seed}")
    options = {"variant": draw.choice(["road_1", "road_2", "road_4"]), "group_size": draw.choice([2, 4, 8])}
    crosses_over("RoadConfig", arch, tmp_path, target_modules=some_layers(arch, draw), **options)


def test_road_with_fields_that_pefts_lacks(tmp_path):
    theirs, _ = both("RoadConfig", "llama", target_modules=["layers.1.self_attn.q_proj"], group_size=4)
    where = {"target_modules": ["q_proj"], "layers_to_transform": 1, "exclude_modules": ["lm_head"]}
    ours = deltatune.RoadConfig(task_type="CAUSAL_LM", group_size=4, **where)
    crossing.crosses_over(theirs, ours, "llama", tmp_path)


@pytest.mark.parametrize("variant", ["road_1", "road_4"])
def test_training_road(variant, tmp_path):
    trains_alike("RoadConfig", "bert", tmp_path, target_modules=ATTENTION["bert"], variant=variant, group_size=8)
