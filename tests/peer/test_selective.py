"""Methods that train a chosen part (the bias, entries, subspaces) against PEFT's, both ways."""

import json
import random
import warnings

import pytest
import torch
from torch.testing import assert_close

import deltatune
from deltatune.clusters import k_means
from deltatune.errors import MismatchError
from tests.core.tiny import TASKS, batch, logits, tiny
from tests.peer.crossing import EXACT, crosses_over, trains_alike
from tests.peer.pairs import ATTENTION, peft, saved_by_peft, theirs

quiet = pytest.mark.filterwarnings("ignore:.*match no module:deltatune.PeftWarning")
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "bert": ["query", "value", "output.dense"], "t5": ["q", "wo"]}


def pair(name, arch, **options):
    """PEFT's config and ours of one method."""
    arguments = {"task_type": TASKS[arch], **options}
    return getattr(peft, name)(**arguments), getattr(deltatune, name)(**arguments)


def read_by_peft_with_a_warning(made, arch, folder):
    """Of missing keys, which hold what PEFT derives by itself."""
    made.save_pretrained(folder / "made")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = peft.PeftModel.from_pretrained(tiny(arch), folder / "made").eval()
    assert_close(logits(there, batch(arch)), logits(made, batch(arch)), **EXACT)


@quiet
@pytest.mark.parametrize("arch", ["llama", "bert", "t5", "bart"])
def test_beft_on_its_usual_targets(arch, tmp_path):
    crosses_over(*pair("BeftConfig", arch), arch, tmp_path)


@pytest.mark.parametrize("arch", ["llama", "bert"])
@pytest.mark.parametrize("init", [True, False])
def test_beft(arch, init, tmp_path):
    crosses_over(*pair("BeftConfig", arch, target_modules=ATTENTION[arch], init_weights=init), arch, tmp_path)


def test_beft_trains_alike(tmp_path):
    trains_alike(pair("BeftConfig", "bert")[0], "bert", tmp_path, lr=1e-2)


@quiet
@pytest.mark.parametrize("arch", ["llama", "bert", "t5"])
def test_glora_on_its_usual_targets(arch, tmp_path):
    _, made = crosses_over(*pair("GloraConfig", arch, r=4), arch, tmp_path, back=arch == "bert")
    read_by_peft_with_a_warning(made, arch, tmp_path)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_glora_with_random_options(arch, seed, tmp_path):
    draw = random.Random(seed)
    options = {
        "r": draw.choice([1, 3, 8]),
        "config_A_B": draw.choice(["lora", "vector", "constant"] + (["none"] if arch == "bert" else [])),
        "config_C": draw.choice(["lora", "vector", "none"]),
        "config_D_E": draw.choice(["vector", "constant", "none"]),
        "init_weights": draw.random() < 0.5,
        "target_modules": draw.sample(ATTENTION[arch], 2),
    }
    if options["config_A_B"] == options["config_C"] == "none":
        options["config_D_E"] = "vector"
    # PEFT reads ours, but warns of its `.zeros`, which our files leave out
    zeros = arch == "llama" or "none" in options.values()
    model, made = crosses_over(*pair("GloraConfig", arch, **options), arch, tmp_path, back=not zeros)
    assert model.get_nb_trainable_parameters() == made.get_nb_trainable_parameters()
    read_by_peft_with_a_warning(made, arch, tmp_path)


@pytest.mark.parametrize("weights", ["lora", "vector"])
def test_glora_trains_alike(weights, tmp_path):
    config, _ = pair("GloraConfig", "bert", r=2, config_A_B=weights, config_D_E="vector")
    trains_alike(config, "bert", tmp_path)


def test_zeros_of_glora_that_are_none_are_refused(tmp_path):
    config, _ = pair("GloraConfig", "bert", config_C="none")
    model = theirs("bert", config)
    with torch.no_grad():
        next(b for name, b in model.named_buffers() if name.endswith("zeros")).fill_(1.0)
    with pytest.raises(MismatchError, match="zeros"):
        deltatune.PeftModel.from_pretrained(tiny("bert"), saved_by_peft(model, tmp_path))


SUPERTUNING = [
    {},
    {"select_top": False, "sparsity": 0.5},
    {"r": 3, "sparsity": 0.8},
    {"r": 2, "lora_alpha": 7.0, "init_weights": False},
    {"init_weights": False, "sparsity": 0.7},
]


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("options", SUPERTUNING, ids=str)
def test_supertuning(options, saved, tmp_path):
    """Chosen entries in the file, or chosen again by both."""
    options = {"target_modules": ATTENTION["bert"], "sparsity": 0.9, "save_precomputed_indices": saved, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="save_precomputed_indices=False")
        model, made = crosses_over(*pair("SupertuningConfig", "bert", **options), "bert", tmp_path)
    assert model.get_nb_trainable_parameters() == made.get_nb_trainable_parameters()


@quiet
@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_supertuning_on_its_usual_targets(arch, tmp_path):
    crosses_over(*pair("SupertuningConfig", arch, save_precomputed_indices=True, r=2), arch, tmp_path)


def test_what_peft_says_nothing_of_is_saved(tmp_path):
    """Its default saves the chosen entries; ours does not, and a file of its that lacks the field means its default."""
    config, own = pair("SupertuningConfig", "bert", sparsity=0.9)
    assert config.save_precomputed_indices and not own.save_precomputed_indices
    folder = saved_by_peft(theirs("bert", config), tmp_path)
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    del values["save_precomputed_indices"]
    path.write_text(json.dumps(values))
    loaded = deltatune.PeftModel.from_pretrained(tiny("bert"), folder)
    assert loaded.peft_config["default"].save_precomputed_indices


def test_supertuning_trains_alike(tmp_path):
    config, _ = pair("SupertuningConfig", "llama", sparsity=0.8, r=2, target_modules=TARGETS["llama"])
    trains_alike(config, "llama", tmp_path)


@pytest.mark.parametrize("seed", range(40))
def test_clusters_are_those_of_scikit_learn(seed):
    from sklearn.cluster import KMeans

    torch.manual_seed(seed)
    count, r = 5 + seed * 7, 2 + seed
    rows = torch.linalg.qr(torch.randn(count + r, r))[0][:count]
    theirs = KMeans(min(1 + seed % 8, count), init="random", n_init=1, max_iter=10, random_state=123456789)
    assert k_means(rows, theirs.n_clusters).tolist() == theirs.fit_predict(rows.numpy()).tolist()


def adamss_crosses_over(arch, folder, **options):
    """PEFT finds V and the clusters again in what our files leave out."""
    options = {"r": 7, "num_subspaces": 3, "target_modules": TARGETS[arch], **options}
    model, made = crosses_over(*pair("AdamssConfig", arch, **options), arch, folder, back=False)
    assert model.get_nb_trainable_parameters() == made.get_nb_trainable_parameters()
    read_by_peft_with_a_warning(made, arch, folder)


@pytest.mark.parametrize("options", [{}, {"subspace_rank": 3}, {"num_subspaces": 6, "init_weights": None},
                                     {"subspace_rank": 4, "use_dynamic_rank": True, "svd_threshold": 0.4},
                                     {"random_seed": 5, "r": 3}], ids=str)  # fmt: skip
@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_adamss(arch, options, tmp_path):
    adamss_crosses_over(arch, tmp_path, **options)


def test_adamss_of_another_device(tmp_path):
    """There the random projection is another, as under another seed; the file's V tells which clusters it led to."""
    options = {"r": 5, "num_subspaces": 3, "target_modules": TARGETS["bert"]}
    model = theirs("bert", pair("AdamssConfig", "bert", random_seed=1, **options)[0])
    folder = saved_by_peft(model, tmp_path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "random_seed": 0}))
    ours = deltatune.PeftModel.from_pretrained(tiny("bert"), folder)
    assert_close(logits(ours, batch("bert")), logits(model, batch("bert")), **EXACT)
    ours.save_pretrained(tmp_path / "again")  # with what was found
    again = deltatune.PeftModel.from_pretrained(tiny("bert"), tmp_path / "again")
    assert_close(logits(again, batch("bert")), logits(model, batch("bert")), **EXACT)


def test_adamss_with_as_many_directions_as_outputs_is_refused(tmp_path):
    """All rows are equally far apart then, and PEFT's clusters, which its file does not hold, rest on rounding."""
    model = theirs("bert", pair("AdamssConfig", "bert", target_modules=["query"])[0])
    with pytest.raises(MismatchError, match="r=16, as many as the layer has outputs"):
        deltatune.PeftModel.from_pretrained(tiny("bert"), saved_by_peft(model, tmp_path))


def test_adamss_trains_alike(tmp_path):
    options = {"r": 7, "num_subspaces": 3, "subspace_rank": 2, "target_modules": TARGETS["bert"]}
    trains_alike(pair("AdamssConfig", "bert", **options)[0], "bert", tmp_path)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_osf_on_its_usual_targets(arch, tmp_path):
    targets = {} if arch == "llama" else {"target_modules": ["q", "wi", "wo"]}
    crosses_over(*pair("OSFConfig", arch, **targets), arch, tmp_path, tolerance=LOOSER)


OSF = [
    {"effective_rank": 3},
    {"effective_rank": 0.25},
    {"rank_pattern": {"query": 5, "den": 0.75}},
    {"init_weights": False, "effective_rank": 12},
]
LOOSER = {"rtol": 1e-4, "atol": 1e-4}  # the update is a difference of two matrices as large as the weight


@pytest.mark.parametrize("options", OSF, ids=str)
def test_osf(options, tmp_path):
    options = {"target_modules": ATTENTION["bert"], **options}
    model, made = crosses_over(*pair("OSFConfig", "bert", **options), "bert", tmp_path, tolerance=LOOSER)
    assert model.get_nb_trainable_parameters() == made.get_nb_trainable_parameters()


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_osf_trains_alike(arch, tmp_path):
    """With the gradient kept off the high space on both sides of tall, wide and square weights."""
    trains_alike(pair("OSFConfig", arch, target_modules=ATTENTION[arch])[0], arch, tmp_path, lr=1e-3)


def test_osf_trains_another_way_without_the_projection(tmp_path, monkeypatch):
    monkeypatch.setattr("deltatune.methods.osf.with_projected_gradient", lambda columns, *basis: columns)
    with pytest.raises(AssertionError):
        trains_alike(pair("OSFConfig", "bert", target_modules=ATTENTION["bert"])[0], "bert", tmp_path, lr=1e-3)
