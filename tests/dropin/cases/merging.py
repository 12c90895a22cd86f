"""Adapters into weights, and adapters out of adapters."""

import torch
from kit import end, gpt2, net, out, plain, raises, scatter, shapes, told, trains, warns
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer


def made(base=None, **options):
    return scatter(get_peft_model(base or net(), LoraConfig(**{"r": 2, "target_modules": ["lin0"], **options}), "a"))


def three(ranks=(2, 2, 2), **options):
    model = made(r=ranks[0], **options)
    for name, rank in zip("bc", ranks[1:]):
        model.add_adapter(name, LoraConfig(r=rank, lora_alpha=4, target_modules=["lin0"]))
    return scatter(model)


def merged_and_unloaded():
    found = {}
    for name, option in {"plain": {}, "safe": {"safe_merge": True}, "bar": {"progressbar": True}}.items():
        model = made()
        before = out(model)
        plain_model = model.merge_and_unload(**option)
        found[name] = [
            before,
            out(plain_model),
            type(plain_model).__name__,
            sorted(plain_model.state_dict()) == sorted(net().state_dict()),
            any(isinstance(m, BaseTunerLayer) for m in plain_model.modules()),
        ]
    return found


def merged_by_name():
    model = three()
    model.base_model.set_adapter(["a", "b"])
    both = out(model)
    return [both, out(model.merge_and_unload(adapter_names=["a", "b"]))]


def merged_by_name_of_one():
    return out(three().merge_and_unload(adapter_names=["c"]))


def unloaded():
    base = made().unload()
    return [
        type(base).__name__,
        out(base),
        sorted(base.state_dict()) == sorted(net().state_dict()),
        type(base.head).__name__,
    ]


def merged_with_a_copy():
    model = made(modules_to_save=["head"])
    scatter(model, 4, "modules_to_save")
    before = out(model)
    merged = model.merge_and_unload()
    return [before, out(merged), type(merged.head).__name__]


def merged_for_a_while():
    model = three()
    found = [out(model)]
    model.merge_adapter()
    found += [out(model), model.get_model_status().merged_adapters]
    model.unmerge_adapter()
    model.merge_adapter(adapter_names=["a", "c"])
    found += [out(model), model.get_model_status().merged_adapters]
    model.unmerge_adapter()
    return [*found, out(model)]


def merged_and_disabled():
    model = made()
    model.merge_adapter()
    with model.disable_adapter():
        inside = out(model)
    return [inside, out(net()), out(model)]


def merged_twice_warns():
    model = made()
    model.merge_adapter()
    return [warns(model.merge_adapter), warns(lambda: (model.unmerge_adapter(), model.unmerge_adapter()))]


def merged_and_switched():
    model = three()
    model.merge_adapter()
    model.set_adapter("b")
    return [out(model), model.get_model_status().merged_adapters]


def deleting_what_is_merged():
    model = three()
    model.merge_adapter()
    return raises(lambda: (model.delete_adapter("a"), model.merge_and_unload()))


def unsafe_numbers_are_refused():
    model = made()
    with torch.no_grad():
        model.base_model.model.layers[0]["lin0"].lora_A["a"].weight[0, 0] = float("nan")
    return raises(lambda: model.merge_and_unload(safe_merge=True))


def of_conv1d():
    model = made(gpt2(), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    before = end(model)
    return [before, end(model.merge_and_unload())]


def of_dora_and_rslora():
    found = []
    for option in ({"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}, {"bias": "all"}):
        model = made(**option)
        found.append([out(model), out(model.merge_and_unload())])
    return found


def of_ia3_and_loha():
    ia3 = get_peft_model(net(), IA3Config(target_modules=["lin0", "lin1"], feedforward_modules=["lin1"]))
    scatter(ia3, prefix="ia3_")
    loha = get_peft_model(net(), LoHaConfig(r=2, target_modules=["lin0"], init_weights=False))
    scatter(loha, prefix="hada_")
    return [[out(m), out(m.merge_and_unload())] for m in (ia3, loha)]


def sums():
    found = {}
    for kind in ("svd", "cat"):
        model = three((1, 2, 3))
        model.add_weighted_adapter(["a", "b", "c"], [0.5, 1.0, -0.3], "sum", combination_type=kind)
        model.set_adapter("sum")
        found[kind] = [
            out(model),
            model.peft_config["sum"].r,
            model.peft_config["sum"].lora_alpha,
            plain(model.peft_config["sum"].target_modules),
        ]
    return found


def sum_of_one():
    model = three()
    model.add_weighted_adapter(["a"], [0.5], "sum", combination_type="linear")
    model.set_adapter("sum")
    return out(model)


def svd_of_a_rank():
    model = three((2, 3, 4))
    model.add_weighted_adapter(
        ["a", "b"], [1.0, 1.0], "sum", combination_type="svd", svd_rank=1, svd_full_matrices=False
    )
    model.set_adapter("sum")
    return [out(model), model.peft_config["sum"].r]


def errors_of_sums():
    model = three((2, 3, 4))
    add = model.add_weighted_adapter
    return {
        "unknown": raises(lambda: add(["a", "nobody"], [1, 1], "x", combination_type="cat")),
        "kind": raises(lambda: add(["a", "b"], [1, 1], "x", combination_type="no_such")),
    }


def sum_keeps_the_choice():
    model = three()
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", combination_type="cat")
    return [plain(model.active_adapters), trains(model), sorted(model.peft_config)]


def sum_on_the_tuner():
    model = three()
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    return out(model)


def sum_of_ia3():
    config = IA3Config(target_modules=["lin0", "lin1"], feedforward_modules=["lin1"])
    model = get_peft_model(net(), config, "a")
    model.add_adapter("b", IA3Config(target_modules=["lin0", "lin1"], feedforward_modules=["lin1"]))
    scatter(model, prefix="ia3_")
    model.add_weighted_adapter(["a", "b"], [0.4, 0.6], "sum")
    model.set_adapter("sum")
    return [out(model), sorted(model.peft_config)]


def low_rank_form_of_other_methods():
    from peft import LoKrConfig
    from peft.tuners.lora.conversion import convert_to_lora

    model = get_peft_model(net(), LoKrConfig(r=2, target_modules=["lin0"], init_weights=False))
    scatter(model, prefix="lokr_")
    config, state = convert_to_lora(model, rank=8)
    return [type(config).__name__, config.r, config.lora_alpha, shapes(state), model.supports_lora_conversion()]


def rescaled_for_a_while():
    from peft.helpers import rescale_adapter_scale

    model = made()
    found = [out(model)]
    with rescale_adapter_scale(model, 0.5):
        found.append(out(model))
    return [
        *found,
        out(model),
        raises(lambda: rescale_adapter_scale(net(), 0.5).__enter__()),
        raises(lambda: rescale_adapter_scale(model, "x").__enter__()),
    ]


def functions_of_merging():
    from peft.utils.merge_utils import dare_linear, magnitude_prune, task_arithmetic, ties

    torch.manual_seed(0)
    tensors, weights = [torch.randn(3, 4) for _ in "abc"], torch.tensor([1.0, 0.5, -1.0])
    return [
        told(task_arithmetic(tensors, weights)),
        told(ties(tensors, weights, 0.5)),
        told(ties(tensors, weights, 0.5, "frequency")),
        told(magnitude_prune(tensors, weights, 0.5)),
        list(dare_linear(tensors, weights, 0.5).shape),
    ]
