"""Which layers a config adapts, with which rank and scaling."""

import torch
from kit import Net, gpt2, llama, net, out, plain, raises, trains
from peft import IA3Config, LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, inspect_matched_modules
from peft.utils import ModulesToSaveWrapper
from torch import nn


def adapted(model):
    return sorted(name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


def with_lora(config, base=None):
    return inject_adapter_in_model(config, base or net())


def a_name_at_the_end():
    return adapted(with_lora(LoraConfig(target_modules=["lin0"])))


def a_path():
    return adapted(with_lora(LoraConfig(target_modules=["layers.1.lin0", "head"])))


def not_a_part_of_a_name():
    return raises(lambda: with_lora(LoraConfig(target_modules=["in0"])))


def a_regular_expression_matches_whole_paths():
    return [
        adapted(with_lora(LoraConfig(target_modules=r"layers\.[01]\.lin0"))),
        adapted(with_lora(LoraConfig(target_modules=r".*lin1"))),
        raises(lambda: with_lora(LoraConfig(target_modules="lin1"))),
    ]


def exclusion():
    return [
        adapted(with_lora(LoraConfig(target_modules=["lin0", "lin1"], exclude_modules=["layers.0.lin0", "lin1"]))),
        adapted(with_lora(LoraConfig(target_modules=["lin0"], exclude_modules=r".*\.2\..*"))),
        raises(lambda: with_lora(LoraConfig(target_modules=["lin0"], exclude_modules=["lin0"]))),
    ]


def all_linear_leaves_the_output_layer():
    return [adapted(get_peft_model(llama(1), LoraConfig(target_modules="all-linear")).base_model.model)]


def all_linear_of_conv1d():
    return adapted(get_peft_model(gpt2(), LoraConfig(target_modules="all-linear")).base_model.model)


def all_linear_with_exclusion():
    config = LoraConfig(target_modules="all-linear", exclude_modules=["q_proj", "down_proj"])
    return adapted(get_peft_model(llama(1), config).base_model.model)


def layers_to_transform():
    return {
        "list": adapted(
            with_lora(LoraConfig(target_modules=["lin0"], layers_to_transform=[0, 2], layers_pattern="layers"))
        ),
        "int": adapted(with_lora(LoraConfig(target_modules=["lin0"], layers_to_transform=1, layers_pattern="layers"))),
        "patterns": adapted(
            with_lora(LoraConfig(target_modules=["lin1"], layers_to_transform=[1], layers_pattern=["h", "layers"]))
        ),
        "none": raises(lambda: with_lora(LoraConfig(target_modules=["lin0"], layers_to_transform=[7]))),
    }


def usual_targets_of_an_architecture():
    return [
        adapted(get_peft_model(llama(1), LoraConfig()).base_model.model),
        adapted(get_peft_model(gpt2(), LoraConfig()).base_model.model),
        adapted(get_peft_model(llama(1), IA3Config()).base_model.model),
    ]


def no_usual_targets():
    return raises(lambda: get_peft_model(net(), LoraConfig()))


def a_layer_of_another_kind():
    return [
        raises(lambda: with_lora(LoraConfig(target_modules=["norm"]))),
        raises(lambda: with_lora(LoraConfig(target_modules=["layers"]))),
    ]


def ranks_and_alphas_by_pattern():
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["lin0", "lin1", "head"],
        rank_pattern={"lin1": 2, r"layers\.0\.lin0": 6, "head": 3},
        alpha_pattern={"layers.1.lin1": 20, "^head": 5},
    )
    model = with_lora(config)
    return {
        name: [m.r["default"], m.lora_alpha["default"], m.scaling["default"]]
        for name, m in model.named_modules()
        if isinstance(m, LoraLayer)
    }


def a_pattern_matches_from_a_dot():
    config = LoraConfig(r=4, target_modules=["lin0"], rank_pattern={"in0": 7, r"1.lin0": 5})
    model = with_lora(config)
    return {name: m.r["default"] for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def rslora_scaling():
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["lin0"], rank_pattern={"layers.1.lin0": 9})
    return [m.scaling["default"] for _, m in with_lora(config).named_modules() if isinstance(m, LoraLayer)]


def rank_zero_is_refused():
    return [
        raises(lambda: with_lora(LoraConfig(r=0, target_modules=["lin0"]))),
        raises(lambda: with_lora(LoraConfig(r=-1, target_modules=["lin0"]))),
    ]


def matched_and_unmatched():
    model = get_peft_model(net(), LoraConfig(target_modules=["lin0"]))
    found = inspect_matched_modules(model.base_model)
    return [sorted(found["matched"]), "head" in found["unmatched"], sorted(model.targeted_module_names)]


def biases():
    found = {}
    for bias in ("none", "lora_only", "all"):
        found[bias] = get_peft_model(
            net(), LoraConfig(target_modules=["lin0"], bias=bias)
        ).get_nb_trainable_parameters()[0]
    return found


def bias_of_lora_itself():
    return trains(get_peft_model(net(), LoraConfig(target_modules=["head"], lora_bias=True)))


def modules_to_save_train():
    model = get_peft_model(net(), LoraConfig(target_modules=["lin0"], modules_to_save=["head", "norm"]))
    return [trains(model), plain(model.modules_to_save), isinstance(model.base_model.model.head, ModulesToSaveWrapper)]


def a_target_that_is_saved_as_well():
    model = get_peft_model(net(), LoraConfig(target_modules=["lin0", "head"], modules_to_save=["head"]))
    return [adapted(model.base_model.model), trains(model)]


def trainable_tokens_by_list_and_dict():
    listed = get_peft_model(llama(1), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 5]))
    named = get_peft_model(net(), LoraConfig(target_modules=["lin0"], trainable_token_indices={"emb": [3, 1]}))
    return [trains(listed), trains(named), out(named)]


def embeddings_and_convolutions():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.c, self.d = nn.Embedding(9, 4), nn.Conv1d(4, 6, 3, padding=1), nn.Conv2d(1, 2, 3)

        def forward(self, x):
            return self.d(self.c(self.e(x).transpose(1, 2))[:, None])

    torch.manual_seed(0)
    model = get_peft_model(Mixed(), LoraConfig(r=2, target_modules=["e", "c", "d"], init_lora_weights=False))
    return [sorted((n, list(p.shape)) for n, p in model.named_parameters()), out(model, torch.arange(8).reshape(2, 4))]


def layer_replication():
    config = LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    model = get_peft_model(llama(2), config)
    return [len(model.base_model.model.model.layers), trains(model), model.base_model.model.config.num_hidden_layers]


def many_names_are_kept():
    names = [f"layers.{i}.{n}" for i in range(3) for n in ("lin0", "lin1")]
    return plain(get_peft_model(net(), LoraConfig(target_modules=names)).peft_config["default"].target_modules)


def the_model_is_changed_in_place():
    base = net()
    model = get_peft_model(base, LoraConfig(target_modules=["lin0"]))
    return [model.base_model.model is base, model.get_base_model() is base, isinstance(base, Net)]
