"""What programs do with adapters: scripts in small, from the quick tours and the troubleshooting pages."""

import os

import torch
from kit import (
    IDS,
    ROWS,
    end,
    folder,
    gpt2,
    llama,
    net,
    out,
    plain,
    printed,
    raises,
    scatter,
    shapes,
    told,
    trains,
    warns,
)
from peft import (
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer


def made(base=None, **options):
    return scatter(get_peft_model(base or net(), LoraConfig(**{"r": 2, "target_modules": ["lin0"], **options})))


def the_quick_tour():
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)
    model = get_peft_model(llama(1), config)
    text = printed(model.print_trainable_parameters)
    where = folder()
    model.save_pretrained(where)
    read = PeftConfig.from_pretrained(where)
    return [
        text,
        read.task_type,
        read.r,
        read.lora_alpha,
        read.lora_dropout,
        end(PeftModel.from_pretrained(llama(1), where)),
    ]


def a_loop_that_never_says_train():
    torch.manual_seed(2)
    model = get_peft_model(llama(1), LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
    return losses


def modes():
    where = folder()
    made(lora_dropout=0.1).save_pretrained(where)
    found = []
    for model in (
        made(),
        PeftModel.from_pretrained(net(), where),
        PeftModel.from_pretrained(net(), where, is_trainable=True),
    ):
        layer = model.base_model.model.layers[0]["lin0"]
        dropout = layer.lora_dropout["default"]
        found.append(
            [model.training, dropout.training, layer.base_layer.training, model.base_model.model.norm.training]
        )
    return found


def training_goes_on_from_a_folder():
    where = folder()
    made().save_pretrained(where)
    model = PeftModel.from_pretrained(net(), where, is_trainable=True)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    loss = model(ROWS).square().mean()
    loss.backward()
    optimizer.step()
    return [round(loss.item(), 5), out(model), trains(model)]


def the_reference_of_a_preference():
    model = made(llama(1), target_modules=["q_proj"], task_type="CAUSAL_LM")
    with torch.no_grad(), model.disable_adapter():
        reference = told(model(IDS).logits)
    return [reference, told(model(IDS).logits), told(llama(1)(IDS).logits)]


def an_adapter_into_a_bare_state_dict():
    model = made()
    model.merge_adapter()
    state = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in model.state_dict().items()
        if model.base_model.prefix not in name
    }
    plain_model = net()
    plain_model.load_state_dict(state)
    model.unmerge_adapter()
    return [out(plain_model), out(model), sorted(state) == sorted(net().state_dict())]


def layers_by_class():
    model = made(target_modules=["lin0", "emb"])
    found = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    return [found, [sorted(module.lora_A) for module in model.modules() if isinstance(module, LoraLayer)]]


def layers_by_attribute():
    model, seen = made(), []
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "lora_B"):
            seen.append([name, list((module.lora_B["default"].weight @ module.lora_A["default"].weight).shape)])
    return seen


def norms_by_name():
    model = made()
    return {n: round(float(p.norm()), 4) for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n}


def optimizer_groups_by_name():
    model = made(modules_to_save=["head"])
    groups = {"A": [], "B": [], "other": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["A" if "lora_A" in name else "B" if "lora_B" in name else "other"].append(name)
    return groups


def weights_of_two_averaged_by_hand():
    one, other = get_peft_model_state_dict(made()), get_peft_model_state_dict(scatter(made(), 40))
    model = made()
    set_peft_model_state_dict(model, {key: (one[key] + other[key]) / 2 for key in one})
    return out(model)


def the_same_name_twice():
    model = made()
    where = folder()
    scatter(made(), 40).save_pretrained(where)
    model.load_adapter(where, "default")
    return [out(model), sorted(model.peft_config)]


def a_mixed_model_from_folders():
    one, two = folder(), folder()
    made().save_pretrained(one)
    scatter(made(target_modules=["lin1"]), 40).save_pretrained(two)
    model = PeftMixedModel.from_pretrained(net(), one)
    model.load_adapter(two, "other")
    model.set_adapter(["default", "other"])
    return [out(model.eval()), sorted(model.peft_config), trains(model) != []]


def half_precision():
    model = made(net().to(torch.bfloat16))
    where = folder()
    model.save_pretrained(where)
    kept = PeftModel.from_pretrained(net().to(torch.bfloat16), where, autocast_adapter_dtype=False)
    wide = PeftModel.from_pretrained(net().to(torch.bfloat16), where)
    kinds = [sorted({str(p.dtype) for n, p in m.named_parameters() if "lora_" in n}) for m in (model, kept, wide)]
    return [kinds, str(model(ROWS).dtype)]


def autocast():
    model = made()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return str(model(ROWS).dtype)


def moved_after_the_adapter():
    model = made().to(torch.float64)
    return [str(model(ROWS).dtype), sorted({str(p.dtype) for p in model.parameters()})]


def a_new_head_and_vocabulary():
    base = llama(1)
    base.resize_token_embeddings(70)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]))
    where = folder()
    model.save_pretrained(where)
    fresh = llama(1)
    fresh.resize_token_embeddings(70)
    loaded = PeftModel.from_pretrained(fresh, where)
    return [end(model.eval()), end(loaded), shapes(get_peft_model_state_dict(model))]


def new_tokens_alone():
    model = get_peft_model(llama(1), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4]))
    model(input_ids=IDS, labels=IDS).loss.backward()
    grown = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    return [sorted(grown), shapes(get_peft_model_state_dict(model)), end(model), end(model.merge_and_unload())]


def a_base_that_is_shared_is_copied_for_training():
    model = made(gpt2(), target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["lm_head"])
    return [trains(model), sorted(k for k in get_peft_model_state_dict(model) if "lm_head" in k)]


def warnings_of_loading():
    where = folder()
    made(target_modules=["lin0"]).save_pretrained(where)
    state = get_peft_model_state_dict(made())
    return [
        warns(lambda: PeftModel.from_pretrained(net(), where)),
        raises(lambda: set_peft_model_state_dict(made(), state, adapter_name="nobody")),
        raises(lambda: get_peft_model_state_dict(made(), adapter_name="nobody")),
    ]


def names_of_folders():
    where = os.path.join(folder(), "deep", "er")
    made().save_pretrained(where)
    return [sorted(os.listdir(where)), PeftConfig.from_pretrained(where).peft_type == "LORA"]


def what_is_active_after_adding():
    model = made()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lin1"]))
    found = [model.active_adapter, plain(model.active_adapters), plain(model.base_model.active_adapters)]
    model.set_adapter("second")
    return [*found, model.active_adapter, model.active_peft_config.target_modules == {"lin1"}]
