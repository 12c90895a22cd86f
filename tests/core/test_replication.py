"""`layer_replication`: a deeper model of the same layers, each replica with adapters of its own."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import AdaLoraConfig, HRAConfig, LoraConfig, PeftModel, get_peft_model
from deltatune.errors import ConfigError, StateError
from tests.core.tiny import batch, logits, tiny

SPANS = [[0, 2], [1, 3]]  # of three layers: 0 1 1 2
TARGETS = {"llama": ["q_proj", "down_proj"], "bert": ["query"], "gpt2": ["c_attn"]}


def config(arch="llama", **options):
    return LoraConfig(**{"r": 2, "target_modules": TARGETS[arch], "layer_replication": SPANS, **options})


def adapted(arch="llama", **options):
    return moved(get_peft_model(deep(arch), config(arch, **options)))


def deep(arch="llama"):
    return (
        tiny(arch)
        if arch == "llama"
        else tiny(arch, **{"bert": {"num_hidden_layers": 3}, "gpt2": {"n_layer": 3}}[arch])
    )


def listed(model):
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def moved(model, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def by_hand(arch="llama"):
    """The deeper model with copies of the layers' weights."""
    sizes = {"llama": {"num_hidden_layers": 4}, "bert": {"num_hidden_layers": 4}, "gpt2": {"n_layer": 4}}[arch]
    made, source = tiny(arch, **sizes), deep(arch).state_dict()
    values = {}
    for name in made.state_dict():
        place = {"llama": "layers", "bert": "layer", "gpt2": "h"}[arch]
        for new, old in enumerate([0, 1, 1, 2]):
            if f".{place}.{new}." in name:
                values[name] = source[name.replace(f".{place}.{new}.", f".{place}.{old}.")]
        values.setdefault(name, source.get(name))
    made.load_state_dict(values)
    return made


@pytest.mark.parametrize("arch", TARGETS)
def test_without_adapters_it_is_the_deeper_model(arch):
    model, inputs = adapted(arch), batch(arch)
    with model.disable_adapter():
        assert_close(logits(model, inputs), logits(by_hand(arch), inputs), rtol=1e-6, atol=1e-6)


def test_each_replica_has_an_adapter_and_shares_the_weight():
    layers = adapted().get_base_model().model.layers
    assert len(layers) == 4
    one, two = (layers[index].self_attn.q_proj for index in (1, 2))
    assert one.base_layer.weight is two.base_layer.weight
    assert not torch.equal(one.adapters["default"].lora_B.weight, two.adapters["default"].lora_B.weight)
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]


def test_the_parameters_of_the_base_are_counted_once():
    trainable, total = adapted().get_nb_trainable_parameters()
    assert total - trainable == sum(p.numel() for p in tiny("llama").parameters())


@pytest.mark.parametrize("arch", TARGETS)
def test_unloading_gives_the_model_back(arch):
    base = deep(arch)
    layers = listed(base)
    model = moved(get_peft_model(base, config(arch)))
    plain = model.unload()
    assert listed(plain) is layers
    assert plain.config.num_hidden_layers == 3
    assert torch.equal(logits(plain, batch(arch)), logits(deep(arch), batch(arch)))


def test_deleting_the_last_adapter_gives_it_back_too():
    model = adapted()
    model.delete_adapter("default")
    assert torch.equal(logits(model, batch("llama")), logits(tiny("llama"), batch("llama")))


def test_merging_gives_each_replica_its_own_weight(tmp_path):
    model, inputs = adapted(), batch("llama")
    expected = logits(model, inputs)
    model.merge_adapter()
    assert_close(logits(model, inputs), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model, inputs), expected)
    merged = model.merge_and_unload()
    assert_close(logits(merged, inputs), expected, rtol=1e-5, atol=1e-5)
    ids = [id(parameter) for parameter in merged.parameters()]
    assert len(ids) == len(set(ids)) and len(list(merged.model.layers)) == 4
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    assert_close(logits(again, inputs), expected, rtol=1e-5, atol=1e-5)


def test_saving_and_loading(tmp_path):
    model, inputs = adapted(), batch("llama")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_generating_with_a_cache():
    model, ids = adapted(), batch("llama")["input_ids"][1:]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(input_ids=ids, use_cache=True, **settings)
    assert torch.equal(with_cache, model.generate(input_ids=ids, use_cache=False, **settings))


def test_copies_are_whole():
    model, inputs = adapted(), batch("llama")
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, inputs), logits(model, inputs))
    assert torch.equal(logits(twin.unload(), inputs), logits(tiny("llama"), inputs))


def test_a_moved_model_comes_back_moved():
    model = adapted().double()
    assert {p.dtype for p in model.unload().parameters()} == {torch.float64}


def test_a_moved_model_whose_parameters_became_other_objects_comes_back_moved():
    model = adapted()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert {p.dtype for p in model.unload().parameters()} == {torch.float64}


def test_all_adapters_of_a_model_have_the_same_list():
    model = adapted()
    model.add_adapter("same", config(r=3))
    for other in (config(layer_replication=[[0, 3]]), config(layer_replication=None), HRAConfig(r=2)):
        with pytest.raises(StateError, match=r"replicated as \[\[0, 2\], \[1, 3\]\]"):
            model.add_adapter("other", other)
    plain = get_peft_model(tiny("llama"), config(layer_replication=None))
    with pytest.raises(StateError, match="carry adapters"):
        plain.add_adapter("other", config())


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([[0, 4]], "4 is past the end; LlamaForCausalLM has 3 layers"),
        ([[2, 1]], r"\[2, 1\] is no pair"),
        ([[-1, 2]], "no pair"),
        ([[0, 1, 2]], "no pair"),
        ([[0, 1.5]], "no pair"),
        ([], "makes 0 layers"),
        ([[0, 3]] * 400, "makes 1200 layers"),
    ],
)
def test_lists_that_are_refused(spans, words):
    base = tiny("llama")
    with pytest.raises(ConfigError, match=words):
        get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], layer_replication=spans))
    assert torch.equal(logits(base, batch("llama")), logits(tiny("llama"), batch("llama")))


def test_a_refused_target_leaves_the_layers_as_they_were():
    base = tiny("llama")
    layers = base.model.layers
    with pytest.raises(Exception, match="nowhere"):
        get_peft_model(base, config(target_modules=["nowhere"]))
    assert base.model.layers is layers and base.config.num_hidden_layers == 3


def test_models_with_two_lists_are_refused():
    with pytest.raises(ConfigError, match="has 2 lists"):
        get_peft_model(tiny("bart"), LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 1]]))


def test_adalora_takes_it_too():
    model = get_peft_model(
        tiny("llama"),
        AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["q_proj"], layer_replication=SPANS),
    )
    assert len(model.get_base_model().model.layers) == 4
