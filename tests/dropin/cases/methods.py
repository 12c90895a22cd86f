"""Methods beside LoRA, classes made by hand, and what prompts hold."""

import torch
from kit import IDS, ROWS, folder, llama, net, out, plain, raises, scatter, shapes, t5, told, trains
from peft import (
    AdaLoraConfig,
    AdaLoraModel,
    C3AConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    PeftModelForCausalLM,
    PrefixEncoder,
    PrefixTuningConfig,
    PromptEmbedding,
    PromptEncoder,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    VeraModel,
    get_peft_model,
    get_peft_model_state_dict,
)

KINDS = {
    "loha": (LoHaConfig, {"r": 2}),
    "lokr": (LoKrConfig, {"r": 2}),
    "ia3": (IA3Config, {"feedforward_modules": ["lin1"], "target_modules": ["lin0", "lin1"]}),
    "oft": (OFTConfig, {"r": 0, "oft_block_size": 4}),
    "hra": (HRAConfig, {"r": 2}),
    "c3a": (C3AConfig, {"block_size": 4}),
    "fourier": (FourierFTConfig, {"n_frequency": 6}),
    "miss": (MissConfig, {"r": 2}),
    "vera": (VeraConfig, {"r": 4}),
    "adalora": (AdaLoraConfig, {"init_r": 4, "target_r": 2, "total_step": 10}),
}


def made(kind, **more):
    cls, options = KINDS[kind]
    torch.manual_seed(4)
    return get_peft_model(net(), cls(**{"target_modules": ["lin0"], **options, **more}))


def what_trains_and_how_much():
    return {
        kind: [trains(made(kind))[:3], made(kind).get_nb_trainable_parameters()[0]] for kind in KINDS if kind != "vera"
    }


def prefixes_and_layers():
    found = {}
    for kind in [kind for kind in KINDS if kind != "adalora"]:  # whose layers PEFT gives the names of LoRA
        model = made(kind)
        layer = model.base_model.model.layers[0]["lin0"]
        found[kind] = [
            model.base_model.prefix,
            sorted(layer.adapter_layer_names),
            type(layer.get_base_layer()).__name__,
        ]
    return found


def training_from_a_seed():
    found = {}
    for kind in ("loha", "lokr", "ia3", "oft", "hra", "miss"):
        model = made(kind).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            loss = model(ROWS).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found[kind] = [round(loss.item(), 5), out(model.eval())]
    return found


def saved_and_loaded():
    found = {}
    for kind in KINDS:
        model, where = made(kind), folder()
        model.save_pretrained(where)
        found[kind] = out(PeftModel.from_pretrained(net(), where)) == out(model.eval())
    return found


def keys_of_files():
    return {kind: shapes(get_peft_model_state_dict(made(kind))) for kind in KINDS if kind != "vera"}


def merged_and_back():
    found = {}
    for kind in ("loha", "lokr", "ia3", "oft", "hra", "miss"):
        model = made(kind)
        with torch.no_grad():
            for index, (_, parameter) in enumerate(sorted(model.named_parameters())):
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.1)
        model.eval()
        before = out(model)
        model.merge_adapter()
        merged = out(model)
        model.unmerge_adapter()
        found[kind] = [before, merged, out(model), out(model.merge_and_unload())]
    return found


def disabled():
    return {kind: out(made(kind).base_model.model) is not None and _off(made(kind)) for kind in KINDS}


def _off(model):
    with model.disable_adapter():
        return out(model)


def two_of_a_kind():
    found = {}
    for kind in ("loha", "ia3", "oft"):
        model = made(kind)
        cls, options = KINDS[kind]
        model.add_adapter("other", cls(**{"target_modules": ["lin0"], **options}))
        model.set_adapter("other")
        model.delete_adapter("default")
        found[kind] = [sorted(model.peft_config), plain(model.active_adapters), trains(model)[:1]]
    return found


def tuners_by_hand():
    return [
        trains(AdaLoraModel(net(), AdaLoraConfig(init_r=4, target_modules=["lin0"], total_step=10), "default"))[:2],
        [name.rpartition(".")[2] for name in trains(VeraModel(net(), VeraConfig(target_modules=["lin0"]), "default"))][
            :2
        ],
    ]


def adalora_adds_to_the_loss():
    torch.manual_seed(4)
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM")
    model = get_peft_model(llama(1), config)
    return [
        round(model(input_ids=IDS, labels=IDS).loss.item(), 4),
        round(model.train()(input_ids=IDS, labels=IDS).loss.item(), 4),
    ]


def task_classes_by_hand():
    model = PeftModelForCausalLM(llama(1), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    return [type(model).__name__, trains(model), model.active_adapter]


def encoders_by_hand():
    torch.manual_seed(4)
    sizes = {
        "num_virtual_tokens": 3,
        "token_dim": 8,
        "num_transformer_submodules": 1,
        "num_attention_heads": 2,
        "num_layers": 2,
    }
    ids = torch.arange(3)[None]
    prefix = PrefixEncoder(
        PrefixTuningConfig(**sizes, encoder_hidden_size=5, prefix_projection=True, task_type="CAUSAL_LM")
    )
    flat = PrefixEncoder(PrefixTuningConfig(**sizes, task_type="CAUSAL_LM"))
    encoder = PromptEncoder(PromptEncoderConfig(**sizes, encoder_hidden_size=5, task_type="CAUSAL_LM"))
    prompt = PromptEmbedding(PromptTuningConfig(**sizes, task_type="CAUSAL_LM"), torch.nn.Embedding(9, 8))
    return [
        [list(part(ids).shape) for part in (prefix, flat, encoder, prompt)],
        [sorted(name for name, _ in part.named_parameters()) for part in (prefix, flat, encoder, prompt)],
    ]


def what_a_prompt_model_holds():
    model = get_peft_model(llama(1), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    return [
        list(model.prompt_encoder["default"].embedding.weight.shape),
        list(model.get_prompt(2).shape),
        list(model.get_prompt_embedding_to_save("default").shape),
        type(model.word_embeddings).__name__,
        list(model.prompt_tokens["default"].shape),
    ]


def a_prefix_is_a_cache():
    model = get_peft_model(llama(2), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    cache = model.get_prompt(2)
    return [cache.get_seq_length(), len(cache)]


def a_sequence_to_sequence_prefix():
    model = get_peft_model(t5(), PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"))
    return [model.get_nb_trainable_parameters(), trains(model), type(model).__name__]


def a_config_keeps_its_type():
    config = LoHaConfig(peft_type="test")
    where = folder()
    config.save_pretrained(where)
    return [config.peft_type == "LOHA", LoHaConfig.from_pretrained(where).to_dict() == config.to_dict()]


def effective_convolutions():
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2))
    found = []
    for use in (True, False):
        model = get_peft_model(
            base, LoHaConfig(r=2, target_modules=["0"], use_effective_conv2d=use, init_weights=False)
        )
        found.append(shapes(dict(model.named_parameters())))
        base = model.unload()
    return found


def refused_sizes():
    return [
        raises(lambda: made("c3a", block_size=5)),
        raises(lambda: made("loha", r=0)),
    ]


def layers_of_other_methods_scale():
    model = made("loha", alpha=4)
    scatter(model, prefix="hada_")
    layer = model.base_model.model.layers[0]["lin0"]
    before = [layer.scaling["default"], told(layer.get_delta_weight("default"))]
    layer.set_scale("default", 2.0)
    return [*before, layer.scaling["default"], told(layer.get_delta_weight("default"))]
