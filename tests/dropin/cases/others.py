"""Prompts, hot-swapping, helpers, training, tuner classes, methods of one's own."""

import copy
import inspect
import pickle

import torch
from kit import IDS, ROWS, end, folder, gpt2, llama, net, out, plain, raises, scatter, shapes, t5, told, trains
from peft import (
    LoraConfig,
    LoraModel,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from torch import nn


def made(base=None, **options):
    return scatter(get_peft_model(base or net(), LoraConfig(**{"r": 2, "target_modules": ["lin0"], **options})))


def prompt(kind=PromptTuningConfig, base=None, **options):
    torch.manual_seed(5)
    return get_peft_model(base or llama(), kind(num_virtual_tokens=3, **{"task_type": "CAUSAL_LM", **options}))


def prompts_tell_of_themselves():
    found = {}
    for kind in (PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig):
        model = prompt(kind)
        found[kind.__name__] = [
            type(model).__name__,
            trains(model),
            plain(model.active_adapters),
            model.get_nb_trainable_parameters(),
            model.active_peft_config.num_virtual_tokens,
            model.active_peft_config.token_dim,
            model.active_peft_config.num_layers,
            model.active_peft_config.num_attention_heads,
            list(model.prompt_encoder),
        ]
    return found


def losses_of_prompts():
    found = []
    for kind in (PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig):
        model = prompt(kind)
        loss = model(input_ids=IDS, labels=IDS, attention_mask=torch.ones_like(IDS)).loss
        loss.backward()
        found.append([round(loss.item(), 4), sorted(n for n, p in model.named_parameters() if p.grad is not None)])
    return found


def generating_with_prompts():
    found = []
    for kind in (PromptTuningConfig, PrefixTuningConfig):
        model = scatter(prompt(kind), prefix="prompt_encoder").eval()
        found.append(
            model.generate(
                input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False
            ).tolist()
        )
    return found


def prompts_for_sequence_to_sequence():
    model = scatter(prompt(base=t5(), task_type="SEQ_2_SEQ_LM"), prefix="prompt_encoder").eval()
    with torch.no_grad():
        loss = model(input_ids=IDS, labels=IDS[:, :3].contiguous()).loss
    return [
        round(loss.item(), 4),
        type(model).__name__,
        model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False).tolist(),
    ]


def several_prompts():
    model = prompt()
    model.add_adapter("other", PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    found = [sorted(model.peft_config), model.active_adapter]
    model.set_adapter("other")
    found += [model.active_adapter, model.get_prompt(batch_size=2).shape[1]]
    model.delete_adapter("default")
    return [*found, sorted(model.peft_config)]


def disabled_prompts():
    model = scatter(prompt(), prefix="prompt_encoder").eval()
    with model.disable_adapter():
        inside = end(model)
    return [inside, end(llama())]


def prompts_from_a_text():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    where = folder()
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "good": 4, "bad": 5, "film": 6}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(where)
    model = prompt(
        prompt_tuning_init=PromptTuningInit.TEXT,
        prompt_tuning_init_text="good bad film good",
        tokenizer_name_or_path=where,
    )
    return told(model.get_prompt_embedding_to_save("default"))


def what_is_saved_of_prompts():
    return [
        list(prompt(kind).get_prompt_embedding_to_save("default").shape)
        for kind in (PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig)
    ]


def a_prompt_needs_a_length():
    return raises(lambda: get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM")))


def rows_of_prompts_on_a_classifier():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        num_labels=3,
    )
    model = get_peft_model(
        BertForSequenceClassification(config), PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")
    )
    scatter(model, prefix="prompt_encoder")
    model.eval()
    with torch.no_grad():
        return [told(model(input_ids=IDS).logits), len(trains(model)), shapes(get_peft_model_state_dict(model))]


def lora_on_a_classifier():
    from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

    found = []
    for kind, task in ((BertForSequenceClassification, "SEQ_CLS"), (BertForTokenClassification, "TOKEN_CLS")):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=40,
            num_labels=3,
        )
        model = scatter(get_peft_model(kind(config), LoraConfig(task_type=task))).eval()
        with torch.no_grad():
            found.append(
                [
                    told(model(input_ids=IDS).logits),
                    trains(model),
                    shapes(get_peft_model_state_dict(model)),
                    plain(model.modules_to_save),
                ]
            )
    return found


def hot_swap():
    from peft.utils.hotswap import hotswap_adapter

    one, two = folder(), folder()
    made().save_pretrained(one)
    other = scatter(made(lora_alpha=4), 70)
    other.save_pretrained(two)
    model = PeftModel.from_pretrained(net(), one)
    hotswap_adapter(model, two, adapter_name="default")
    return [out(model), out(other)]


def hot_swap_of_others():
    from peft import LoHaConfig
    from peft.utils.hotswap import check_hotswap_configs_compatible, hotswap_adapter

    where, dora = folder(), folder()
    made(target_modules=["lin1"]).save_pretrained(where)
    made(use_dora=True).save_pretrained(dora)
    model = made()
    return [
        raises(lambda: hotswap_adapter(model, where, adapter_name="default")),
        raises(lambda: check_hotswap_configs_compatible(LoraConfig(), LoHaConfig())),
        raises(lambda: check_hotswap_configs_compatible(LoraConfig(), LoraConfig(use_dora=True))),
        raises(lambda: check_hotswap_configs_compatible(LoraConfig(r=3), LoraConfig(r=4))),
    ]


def prepared_for_hot_swap():
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    model = made()
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    return [shapes({n: p for n, p in model.named_parameters() if "lora_" in n}), out(model)]


def tuners_by_hand():
    torch.manual_seed(3)
    tuner = LoraModel(net(), LoraConfig(r=2, target_modules=["lin0"]), "mine")
    scatter(tuner)
    found = [
        out(tuner),
        sorted(tuner.peft_config),
        plain(tuner.active_adapters),
        tuner.prefix,
        isinstance(tuner, nn.Module),
        trains(tuner),
    ]
    tuner.set_adapter("mine")
    tuner.disable_adapter_layers()
    found.append(out(tuner))
    tuner.enable_adapter_layers()
    tuner.merge_adapter()
    tuner.unmerge_adapter()
    return [*found, out(tuner.merge_and_unload())]


def several_tuners_by_hand():
    from peft import IA3Config, IA3Model, LoHaConfig, LoHaModel

    torch.manual_seed(3)
    return [
        trains(IA3Model(net(), IA3Config(target_modules=["lin0"], feedforward_modules=[]), "default")),
        trains(LoHaModel(net(), LoHaConfig(r=2, target_modules=["lin0"]), "default")),
        trains(LoraModel(net(), {"x": LoraConfig(target_modules=["lin0"])}, "x")),
    ]


def functions_on_any_model():
    from peft.functional import delete_adapter, set_adapter, set_requires_grad

    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["lin0"]), net(), "a")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lin1"]), model, "b")
    scatter(model)
    found = [trains(model), out(model)]
    set_adapter(model, "a")
    found += [trains(model), out(model)]
    set_adapter(model, ["a", "b"])
    found += [trains(model), out(model)]
    set_adapter(model, "a", inference_mode=True)
    set_requires_grad(model, ["b"], True)
    found.append(trains(model))
    delete_adapter(model, "b", prefix="lora_")
    return [*found, trains(model), out(model)]


def signatures():
    from peft.helpers import update_forward_signature, update_generate_signature, update_signature

    model = made(t5(), target_modules=["q"], task_type="SEQ_2_SEQ_LM")
    update_forward_signature(model)
    update_generate_signature(model)
    update_signature(model)
    names = list(inspect.signature(model.forward).parameters)
    return [
        "input_ids" in names,
        "decoder_input_ids" in names,
        len(list(inspect.signature(model.generate).parameters)) > 1,
    ]


def is_it_an_adapter():
    from peft.helpers import check_if_peft_model

    where = folder()
    made().save_pretrained(where)
    return [check_if_peft_model(where), check_if_peft_model(folder())]


def prepared_for_training():
    from peft import prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(llama(1).half())
    return [sorted({str(p.dtype) for p in model.parameters()}), trains(model), model.is_gradient_checkpointing]


def cast_for_mixed_precision():
    from peft import cast_mixed_precision_params

    model = made()
    cast_mixed_precision_params(model, torch.bfloat16)
    return sorted((n, str(p.dtype)) for n, p in model.named_parameters())[:9]


def input_casting_may_be_off():
    from peft.helpers import disable_input_dtype_casting

    model = made()
    with disable_input_dtype_casting(model, active=True):
        return out(model)


def optimizer_groups():
    from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

    plus = create_loraplus_optimizer(made(), torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4.0, weight_decay=0.1)
    model = made()
    frozen = create_lorafa_optimizer(model, r=2, lora_alpha=4, lr=1e-3)
    return [
        [[len(g["params"]), g["lr"], g["weight_decay"]] for g in plus.param_groups],
        [len(frozen.param_groups), frozen.param_groups[0]["lr"], trains(model)],
        type(plus).__name__,
    ]


def a_few_steps():
    torch.manual_seed(1)
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["lin0", "head"], lora_dropout=0.1)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(ROWS).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
    return [losses, out(model.eval())]


def starts_under_a_seed():
    found = {}
    for init in (True, False, "gaussian", "olora", "orthogonal", "pissa"):
        torch.manual_seed(11)
        model = get_peft_model(
            net(),
            LoraConfig(
                r=2, target_modules=["lin0", "emb"] if init in (True, False) else ["lin0"], init_lora_weights=init
            ),
        )
        found[str(init)] = out(model)
    return found


def a_trainer():
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(1)
    model = get_peft_model(llama(1), LoraConfig(r=2, task_type="CAUSAL_LM"))
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS]
    arguments = TrainingArguments(
        folder(),
        max_steps=3,
        per_device_train_batch_size=2,
        report_to=[],
        logging_steps=1,
        save_steps=3,
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    import os

    return [
        [round(e["loss"], 4) for e in trainer.state.log_history if "loss" in e],
        sorted(n for n in os.listdir(trainer.args.output_dir + "/checkpoint-3") if "adapter" in n),
    ]


def compiled():
    model = made()
    whole = torch.compile(model, backend="eager")
    return [out(whole), shapes(get_peft_model_state_dict(whole, unwrap_compiled=True))]


def jit_and_functional_calls():
    model = made()
    parameters = dict(model.named_parameters())
    return told(torch.func.functional_call(model, parameters, (ROWS,)))


def filters_by_name():
    model = made(modules_to_save=["head"])
    lora = [n for n, _ in model.named_parameters() if "lora_" in n]
    copies = [n for n, _ in model.named_parameters() if "modules_to_save" in n]
    return [len(lora), copies, all(n.startswith("base_model.model.") for n in lora)]


def saved_whole():
    import os

    where = os.path.join(folder(), "whole.pt")
    model = made()
    torch.save(model, where)
    return [out(torch.load(where, weights_only=False)), out(model)]


def two_models_of_one_base():
    base = net()
    one = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["lin0"]))
    two = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["lin1"]))
    scatter(one)
    return [out(one), out(two), out(base)]


def multihead_attention():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.mha(x, x, x)[0]

    torch.manual_seed(0)
    model = scatter(get_peft_model(Attends(), LoraConfig(r=2, target_modules=["mha"])))
    torch.linspace(-1, 1, 48).reshape(2, 3, 8)
    return shapes(get_peft_model_state_dict(model))


def parameters_as_targets():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 8, 4))

        def forward(self, x):
            return x @ self.up.sum(0)

    torch.manual_seed(0)
    model = scatter(
        get_peft_model(nn.ModuleDict({"e": Experts()}), LoraConfig(r=2, target_modules=[], target_parameters=["e.up"]))
    )
    x = torch.linspace(-1, 1, 16).reshape(2, 8)
    return [told(model.base_model.model["e"](x)), shapes(get_peft_model_state_dict(model)), trains(model)]


def adalora_shrinks():
    from peft import AdaLoraConfig

    torch.manual_seed(1)
    model = get_peft_model(
        net(),
        AdaLoraConfig(
            target_modules=["lin0"],
            init_r=4,
            target_r=2,
            tinit=1,
            tfinal=1,
            total_step=5,
            task_type="FEATURE_EXTRACTION",
        ),
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for step in range(1, 5):
        model.base_model.model(ROWS).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    found = model.peft_config["default"].rank_pattern
    return {key.removesuffix(".default"): kept for key, kept in found.items()}


def a_custom_layer_class():
    class Twice(nn.Linear):
        pass

    torch.manual_seed(0)
    model = scatter(get_peft_model(nn.Sequential(Twice(4, 4), nn.Linear(4, 2)), LoraConfig(r=2, target_modules=["0"])))
    return told(model(torch.ones(1, 4)))


def pickles_of_configs_in_models():
    model = made()
    again = pickle.loads(pickle.dumps(model))
    return [
        again.peft_config["default"].r,
        again.active_adapter,
        sorted(again.state_dict()) == sorted(model.state_dict()),
    ]


def adapter_warmup_by_scaling():
    model = made()
    for module in model.modules():
        if hasattr(module, "scaling"):
            module.scaling["default"] = 0.0
    return [out(model), out(net())]


def all_modules_with_lora_by_attribute():
    model = made()
    return [
        sum(hasattr(m, "lora_A") for m in model.modules()),
        sum(hasattr(m, "merge") for m in model.modules()),
        sum(hasattr(m, "active_adapter") for m in model.modules()),
    ]


def merging_into_gpt2_and_generating():
    model = made(gpt2(), target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model.generation_config.pad_token_id = 0
    before = model.generate(IDS, max_new_tokens=3, do_sample=False).tolist()
    return [before, model.merge_and_unload().generate(IDS, max_new_tokens=3, do_sample=False).tolist()]
