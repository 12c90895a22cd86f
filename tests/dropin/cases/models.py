"""The model around the adapters: counting, switching, adding and deleting, status, mixed batches."""

import torch
from kit import IDS, ROWS, end, llama, net, out, plain, printed, raises, scatter, told, trains
from peft import (
    LoHaConfig,
    LoraConfig,
    LoraModel,
    PeftMixedModel,
    PeftModel,
    PeftModelForCausalLM,
    get_layer_status,
    get_model_status,
    get_peft_model,
)


def two(base=None, **options):
    model = get_peft_model(base or net(), LoraConfig(**{"r": 2, "target_modules": ["lin0"], **options}), "a")
    model.add_adapter("b", LoraConfig(**{"r": 3, "target_modules": ["lin1"], **options}))
    return scatter(model)


def printed_counts():
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["lin0"]))
    plain_model = get_peft_model(net(), LoraConfig(r=2, target_modules=["lin0"], modules_to_save=["head"]))
    return [
        printed(model.print_trainable_parameters),
        printed(plain_model.print_trainable_parameters),
        model.get_nb_trainable_parameters(),
        printed(two().print_trainable_parameters),
    ]


def classes_by_task():
    found = {}
    for task in ("CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM", "QUESTION_ANS", "TOKEN_CLS", "SEQ_CLS", None):
        base = llama(1)
        if task in ("TOKEN_CLS", "SEQ_CLS", "QUESTION_ANS"):
            base.score = torch.nn.Linear(32, 2)
            base.qa_outputs = torch.nn.Linear(32, 2)
        model = get_peft_model(base, LoraConfig(task_type=task, target_modules=["q_proj"]))
        found[str(task)] = [type(model).__name__, plain(model.modules_to_save)]
    return found


def what_the_model_tells():
    model = two(llama(1), target_modules=["q_proj"], task_type="CAUSAL_LM")
    return [
        isinstance(model, PeftModel),
        isinstance(model, PeftModelForCausalLM),
        isinstance(model.base_model, LoraModel),
        model.active_adapter,
        model.active_adapters,
        sorted(model.peft_config),
        model.peft_type == "LORA",
        model.active_peft_config.r,
        model.config.model_type,
        model.config.hidden_size,
        str(model.device),
        str(model.dtype),
        model.base_model.prefix,
        model.training,
        model.generation_config.eos_token_id,
        model.main_input_name,
        model.has_active_enabled_adapter,
        type(model.get_input_embeddings()).__name__,
        type(model.get_output_embeddings()).__name__,
        str(model.base_model_torch_dtype),
    ]


def a_model_without_config():
    model = two()
    return [model.peft_config["a"].base_model_name_or_path, model.peft_config["a"].task_type]


def attributes_of_the_base_are_reached():
    model = get_peft_model(net(), LoraConfig(target_modules=["lin0"]))
    model.base_model.model.mine = 3
    return [model.mine, len(model.layers), type(model.norm).__name__, raises(lambda: model.no_such_thing)]


def repr_of_the_model():
    text = repr(get_peft_model(net(), LoraConfig(target_modules=["lin0"])))
    return [
        text.startswith("PeftModel("),
        "(base_model): LoraModel(" in text,
        "(model): Net(" in text,
        "lora_A" in text,
    ]


def names_of_parameters():
    model = get_peft_model(net(), LoraConfig(target_modules=["lin0"], modules_to_save=["head"]))
    return [[name for name, _ in model.named_parameters()], sorted(model.state_dict())]


def a_state_dict_of_the_whole_model():
    one, other = two(), scatter(two(), 70)
    result = other.load_state_dict(one.state_dict())
    return [list(result.missing_keys), list(result.unexpected_keys), out(one) == out(other), len(one.state_dict())]


def parts_of_a_state_dict():
    one, other = two(), scatter(two(), 70)
    part = {name: value for name, value in one.state_dict().items() if "lora_" in name}
    result = other.load_state_dict(part, strict=False)
    return [len(result.missing_keys), list(result.unexpected_keys), out(one) == out(other)]


def switching():
    model = two()
    found = [out(model), trains(model)]
    model.set_adapter("b")
    found += [out(model), trains(model), model.active_adapter]
    model.base_model.set_adapter(["a", "b"])
    found += [out(model), trains(model), plain(model.active_adapters)]
    model.set_adapter("a", inference_mode=True)
    return [*found, out(model), trains(model)]


def errors_of_switching():
    model = two()
    return {
        "set": raises(lambda: model.set_adapter("c")),
        "delete": raises(lambda: model.delete_adapter("c")),
        "names": raises(lambda: model(ROWS, adapter_names=["a"])),
        "unknown names": raises(lambda: model(ROWS, adapter_names=["a", "z", "b"])),
        "status of a plain model": raises(lambda: get_layer_status(net())),
        "model status of a plain model": raises(lambda: get_model_status(net())),
    }


def deleting_the_active_one():
    model = two()
    model.delete_adapter("a")
    model.set_adapter("b")
    found = [sorted(model.peft_config), plain(model.active_adapters), out(model), trains(model)]
    model.add_adapter("a", LoraConfig(r=1, target_modules=["lin0"]))
    return [*found, sorted(model.peft_config), plain(model.active_adapters)]


def deleting_another_one():
    model = two()
    model.delete_adapter("b")
    return [
        sorted(model.peft_config),
        plain(model.active_adapters),
        out(model),
        sorted(k for k in model.state_dict() if ".b." in k),
    ]


def disabling_for_a_while():
    model, base = two(), net()
    with model.disable_adapter():
        inside = [out(model)]
    inside.append(out(base))
    return [*inside, out(model), trains(model)]


def disabling_until_enabled():
    model = two()
    model.disable_adapter_layers()
    off = [out(model), get_model_status(model).enabled]
    model.enable_adapter_layers()
    return [*off, out(model), trains(model), get_model_status(model).enabled]


def requiring_gradients():
    model = two()
    model.set_requires_grad("b")
    found = [trains(model)]
    model.set_requires_grad(["a", "b"], requires_grad=False)
    found.append(trains(model))
    model.set_requires_grad("a")
    return [*found, trains(model)]


def layer_status():
    model = two()
    model.set_adapter("b")
    model.base_model.model.layers[0]["lin1"].merge()
    found = []
    for one in get_layer_status(model):
        found.append(
            [
                one.name,
                one.module_type,
                one.enabled,
                plain(one.active_adapters),
                plain(one.merged_adapters),
                plain(one.requires_grad),
                plain(one.available_adapters),
                plain(one.devices),
            ]
        )
    return sorted(found, key=lambda one: one[0])


def model_status():
    model = two()
    one = model.get_model_status()
    return [
        one.base_model_type,
        one.adapter_model_type,
        plain(one.peft_types),
        one.trainable_params,
        one.total_params,
        one.num_adapter_layers,
        one.enabled,
        plain(one.active_adapters),
        plain(one.merged_adapters),
        plain(one.requires_grad),
        plain(one.available_adapters),
        plain(one.devices),
    ]


def irregular_status():
    model = two()
    model.base_model.model.layers[0]["lin0"].lora_A["a"].weight.requires_grad_(False)
    return [
        plain(model.get_model_status().requires_grad),
        plain([one.requires_grad for one in model.get_layer_status()]),
    ]


def status_as_a_dict():
    from dataclasses import asdict

    return sorted(asdict(two().get_model_status()))


def status_of_an_injected_model():
    from peft import inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(target_modules=["lin0"]), net())
    one = get_model_status(model)
    return [one.num_adapter_layers, len(get_layer_status(model))]


def rows_with_their_own_adapter():
    model = two().eval()
    found = [out(model, adapter_names=["a", "b", "__base__"]), out(model, adapter_names=["b", "b", "a"])]
    model.set_adapter("b")
    return [*found, out(model, adapter_names=["__base__"] * 3), out(model)]


def rows_in_generate():
    model = two(llama(2), target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM").eval()
    options = {"max_new_tokens": 4, "do_sample": False}
    return [
        model.generate(IDS, adapter_names=["a", "b", "__base__", "a"], **options).tolist(),
        model.generate(input_ids=IDS, **options).tolist(),
        model.generate(input_ids=IDS, num_beams=2, adapter_names=["a", "b", "__base__", "a"], **options).tolist(),
    ]


def rows_with_trained_copies():
    model = get_peft_model(net(), LoraConfig(target_modules=["lin0"], modules_to_save=["head"]), "a")
    model.add_adapter("b", LoraConfig(target_modules=["lin0"], modules_to_save=["head"]))
    scatter(model)
    scatter(model.eval(), 30, "modules_to_save")
    return out(model, adapter_names=["a", "b", "__base__"])


def mixed_kinds():
    model = get_peft_model(net(), LoraConfig(target_modules=["lin0"], init_lora_weights=False), "lora", mixed=True)
    model.add_adapter("loha", LoHaConfig(r=2, target_modules=["lin1"], init_weights=False))
    scatter(model)
    scatter(model, 40, "hada_")
    found = [type(model).__name__, isinstance(model, PeftMixedModel), plain(model.active_adapters), out(model)]
    model.set_adapter("loha")
    found += [plain(model.active_adapters), out(model)]
    model.set_adapter(["lora", "loha"])
    found += [out(model), model.get_nb_trainable_parameters()]
    with model.disable_adapter():
        found.append(out(model))
    model.delete_adapter("lora")
    return [*found, sorted(model.peft_config), out(model), out(model.merge_and_unload())]


def errors_of_mixed_kinds():
    from peft import PromptTuningConfig

    model = get_peft_model(net(), LoraConfig(target_modules=["lin0"]), mixed=True)
    return [
        raises(lambda: model.add_adapter("x", PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))),
        raises(lambda: model.set_adapter("nobody")),
    ]


def half_precision_adapters():
    found = {}
    for cast in (True, False):
        model = get_peft_model(
            net().to(torch.bfloat16), LoraConfig(target_modules=["lin0"]), autocast_adapter_dtype=cast
        )
        found[str(cast)] = sorted({str(p.dtype) for n, p in model.named_parameters() if "lora_" in n})
    return found


def without_memory_for_numbers():
    model = get_peft_model(net(), LoraConfig(target_modules=["lin0"]), low_cpu_mem_usage=True)
    return sorted({str(p.device) for n, p in model.named_parameters() if "lora_" in n})


def the_base_is_frozen():
    base = net()
    base.head.weight.requires_grad_(True)
    model = get_peft_model(base, LoraConfig(target_modules=["lin0"]))
    return [trains(model), sorted(n for n, p in base.named_parameters() if p.requires_grad and "lora" not in n)]


def an_adapter_named_with_a_dot():
    return raises(lambda: get_peft_model(net(), LoraConfig(target_modules=["lin0"]), "a.b"))


def inference_mode_trains_nothing():
    return trains(get_peft_model(net(), LoraConfig(target_modules=["lin0"], inference_mode=True)))


def calls_with_positions_and_keywords():
    model = two(llama(1), target_modules=["q_proj"], task_type="CAUSAL_LM")
    with torch.no_grad():
        found = [
            told(model(IDS).logits),
            told(model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits),
            told(model(inputs_embeds=model.get_input_embeddings()(IDS)).logits),
            [round(float(model(input_ids=IDS, labels=IDS).loss), 5)],
            told(model(input_ids=IDS, return_dict=False)[0]),
            len(model(input_ids=IDS, output_hidden_states=True).hidden_states),
        ]
    return found


def gradient_checkpointing():
    model = two(llama(2), target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM").train()
    model.gradient_checkpointing_enable()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [
        round(loss.item(), 5),
        sorted((n, told(p.grad)[:3]) for n, p in model.named_parameters() if p.grad is not None)[:4],
    ]


def inputs_that_require_gradients():
    model = two(llama(1), target_modules=["q_proj"], task_type="CAUSAL_LM")
    model.enable_input_require_grads()
    return model.get_input_embeddings()(IDS).requires_grad


def several_gpus_in_name_only():
    model = torch.nn.DataParallel(two())
    return out(model)


def resizing_and_tying():
    model = two(llama(1), target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    base = llama(1)
    wrapped = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    base.resize_token_embeddings(70)
    return [
        list(wrapped.get_input_embeddings().weight.shape),
        list(model.get_input_embeddings().weight.shape),
        end(wrapped),
    ]
