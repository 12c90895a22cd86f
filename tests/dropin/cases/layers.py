"""What an adapted layer tells, takes and does."""

import copy
import pickle

import torch
from kit import ROWS, net, out, plain, raises, scatter, told
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

EMPTY = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "prompt_encoder")  # here


def made(**options):
    model = get_peft_model(net(), LoraConfig(**{"r": 2, "target_modules": ["lin0"], **options}))
    return scatter(model), model.base_model.model.layers[0]["lin0"]


def attributes():
    _, layer = made(lora_alpha=6)
    return {
        "r": layer.r,
        "alpha": layer.lora_alpha,
        "scaling": layer.scaling,
        "in": layer.in_features,
        "out": layer.out_features,
        "use_dora": layer.use_dora,
        "use_rslora": getattr(layer, "use_rslora", None),
        "dropout": list(layer.lora_dropout),
        "dropout kind": type(layer.lora_dropout["default"]).__name__,
        "A": list(layer.lora_A),
        "embedding A": list(layer.lora_embedding_A),
        "magnitude": list(layer.lora_magnitude_vector),
        "merged": [layer.merged, layer.merged_adapters],
        "active": [layer.active_adapter, layer.active_adapters, layer.disable_adapters],
        "names": [layer.adapter_layer_names, sorted(layer.other_param_names)],
        "base": type(layer.base_layer).__name__,
        "bias": layer.lora_bias,
    }


def factors_are_modules():
    _, layer = made()
    factor = layer.lora_A["default"]
    x = torch.linspace(-1, 1, 8)[None]
    return [
        isinstance(layer.lora_A, nn.ModuleDict),
        isinstance(factor, nn.Module),
        factor.in_features,
        factor.out_features,
        factor.bias is None,
        told(factor(x)),
        told(layer.lora_B["default"](factor(x))),
        "default" in layer.lora_A,
        len(layer.lora_A),
        [name for name, _ in layer.lora_A.items()],
    ]


def dropout_has_its_probability():
    _, layer = made(lora_dropout=0.25)
    return [type(layer.lora_dropout["default"]).__name__, layer.lora_dropout["default"].p]


def factors_may_be_written():
    model, layer = made()
    before = out(model)
    layer.lora_B["default"].weight.data.zero_()
    zeroed = out(model)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.ones(2, 8))
        layer.lora_B["default"].weight.fill_(0.1)
    nn.init.constant_(layer.lora_B["default"].weight, 0.05)
    return [before, zeroed, out(model)]


def a_weight_may_be_replaced():
    model, layer = made()
    layer.lora_A["default"].weight = nn.Parameter(torch.ones(2, 8))
    return [out(model), "layers.0.lin0.lora_A.default.weight" in " ".join(dict(model.named_parameters()))]


def base_layer_and_weights():
    _, layer = made()
    return [
        layer.get_base_layer() is layer.base_layer,
        layer.bias is layer.base_layer.bias,
        list(layer.weight.shape),
    ]


def scaling_of_one_adapter():
    model, layer = made(lora_alpha=4)
    found = [layer.scaling["default"]]
    for step in (
        lambda: layer.set_scale("default", 0.5),
        lambda: layer.scale_layer(4.0),
        lambda: layer.unscale_layer(2.0),
        lambda: layer.unscale_layer(),
        lambda: layer.set_scale("nobody", 3.0),
        lambda: layer.scaling.__setitem__("default", 7.0),
    ):
        step()
        found.append([layer.scaling["default"], out(model)])
    return found


def switching_on_the_layer():
    model, layer = made()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["lin0"]))
    scatter(model, 50)
    for part in model.modules():
        if isinstance(part, BaseTunerLayer):
            part.set_adapter("other")
    found = [
        layer.active_adapters,
        out(model),
        layer.lora_A["other"].weight.requires_grad,
        layer.lora_A["default"].weight.requires_grad,
    ]
    for part in model.modules():
        if isinstance(part, BaseTunerLayer):
            part.set_adapter(["default", "other"])
    found += [layer.active_adapters, out(model)]
    for part in model.modules():
        if isinstance(part, BaseTunerLayer):
            part.enable_adapters(False)
    return [*found, out(model), layer.disable_adapters]


def merging_the_layer():
    model, layer = made()
    before = out(model)
    layer.merge()
    merged = [
        layer.merged,
        list(layer.merged_adapters),
        all(abs(a - b) < 1e-4 for a, b in zip(out(model), before)),
        told(layer.base_layer.weight),
    ]
    layer.unmerge()
    return [merged, layer.merged, told(layer.base_layer.weight)]


def merging_by_name():
    model, layer = made()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["lin0"]))
    scatter(model, 50)
    layer.merge(adapter_names=["other"])
    found = [list(layer.merged_adapters), told(layer.get_base_layer().weight)]
    layer.merge(adapter_names=["default"], safe_merge=True)
    return [found, layer.merged_adapters, told(layer.get_base_layer().weight)]


def delta_weights():
    _, layer = made(lora_alpha=6)
    return [told(layer.get_delta_weight("default")), list(layer.get_delta_weight("default").shape)]


def delta_weight_of_nobody():
    _, layer = made()
    return raises(lambda: layer.get_delta_weight("nobody"))


def an_adapter_more_on_the_layer():
    _model, layer = made()
    torch.manual_seed(4)
    layer.update_layer(
        "more",
        r=3,
        lora_alpha=6,
        lora_dropout=0.0,
        init_lora_weights=False,
        use_rslora=False,
        config=LoraConfig(r=3, lora_alpha=6, init_lora_weights=False),
    )
    return [sorted(layer.lora_A), layer.r, layer.scaling, list(layer.lora_A["more"].weight.shape)]


def deleting_on_the_layer():
    model, layer = made()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["lin0"]))
    layer.delete_adapter("default")
    return [sorted(layer.lora_A), layer.active_adapters, list(layer.r)]


def what_the_layer_is():
    _model, layer = made()
    other = get_peft_model(net(), LoHaConfig(r=2, target_modules=["lin0"])).base_model.model.layers[0]["lin0"]
    third = get_peft_model(net(), IA3Config(target_modules=["lin0"], feedforward_modules=[])).base_model.model.layers[
        0
    ]["lin0"]
    return [
        [isinstance(x, kind) for kind in (LoraLayer, Linear, BaseTunerLayer, nn.Module)] for x in (layer, other, third)
    ]


def repr_shows_the_parts():
    _model, layer = made(lora_dropout=0.1)
    text = repr(layer)
    return [
        part in text for part in ("base_layer", "lora_A", "lora_B", "lora_dropout", "default", "Linear(in_features=8")
    ]


def children_and_modules():
    _model, layer = made()
    return [
        [name for name, _ in layer.named_children() if name not in EMPTY],
        sorted(name for name, _ in layer.named_parameters()),
        sorted(layer.state_dict()),
    ]


def module_names_of_the_model():
    model, _ = made(target_modules=["head"])
    return sorted(n for n, _ in model.named_modules() if n.rpartition(".")[2] not in EMPTY)


def parts_by_path():
    model, _ = made()
    path = "base_model.model.layers.0.lin0"
    return [
        list(model.get_parameter(f"{path}.lora_A.default.weight").shape),
        list(model.get_parameter(f"{path}.base_layer.weight").shape),
        type(model.get_submodule(f"{path}.base_layer")).__name__,
        list(model.get_submodule(f"{path}.lora_A.default").weight.shape),
    ]


def copies_of_the_model():
    model, _ = made()
    found = [out(copy.deepcopy(model)), out(pickle.loads(pickle.dumps(model)))]
    twin = copy.deepcopy(model)
    scatter(twin, 90)
    return [*found, out(twin), out(model)]


def casting_and_moving():
    model, _layer = made()
    kinds = {}
    for name, change in {
        "half": lambda m: m.half(),
        "bf": lambda m: m.to(torch.bfloat16),
        "float": lambda m: m.float(),
        "double": lambda m: m.double(),
    }.items():
        change(model)
        kinds[name] = sorted({str(p.dtype) for p in model.parameters()})
    return [kinds, out(model)]


def modes_reach_the_layers():
    model, layer = made(lora_dropout=0.3)
    model.train()
    on = [layer.training, layer.lora_dropout["default"].training]
    model.eval()
    return [on, layer.training, layer.lora_dropout["default"].training]


def dropout_under_a_seed():
    model, _ = made(lora_dropout=0.5)
    model.train()
    torch.manual_seed(7)
    return told(model(ROWS))


def parameters_have_gradients():
    model, layer = made()
    model(ROWS).square().sum().backward()
    return [
        told(layer.lora_A["default"].weight.grad),
        told(layer.lora_B["default"].weight.grad),
        layer.base_layer.weight.grad is None,
        sorted(name for name, p in model.named_parameters() if p.grad is not None)[:2],
    ]


def a_wrapper_of_a_trained_copy():
    model, _ = made(modules_to_save=["head"])
    head = model.base_model.model.head
    return [
        isinstance(head.modules_to_save, nn.ModuleDict),
        sorted(name for name, _ in head.named_parameters()),
        head.active_adapter if isinstance(head.active_adapter, str) else list(head.active_adapter),
        head.disable_adapters,
        list(head.weight.shape),
        head.weight is head.modules_to_save["default"].weight,
        type(head.original_module).__name__,
    ]


def what_a_config_of_dora_adds():
    model, layer = made(use_dora=True, lora_alpha=4)
    return [
        layer.use_dora,
        list(layer.lora_magnitude_vector),
        told(layer.lora_magnitude_vector["default"].weight),
        sorted(name for name, _ in layer.named_parameters()),
        out(model),
    ]


def of_ia3():
    model = get_peft_model(net(), IA3Config(target_modules=["lin0", "lin1"], feedforward_modules=["lin1"]))
    one, two = model.base_model.model.layers[0]["lin0"], model.base_model.model.layers[0]["lin1"]
    return [list(one.ia3_l["default"].shape), one.is_feedforward, two.is_feedforward, plain(one.adapter_layer_names)]


def of_loha():
    model = get_peft_model(net(), LoHaConfig(r=2, alpha=4, target_modules=["lin0"], init_weights=False))
    scatter(model, prefix="hada_")
    layer = model.base_model.model.layers[0]["lin0"]
    return [
        layer.r,
        layer.alpha,
        layer.scaling,
        told(layer.hada_w1_a["default"]),
        told(layer.get_delta_weight("default")),
        out(model),
    ]
