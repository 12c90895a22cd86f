"""PEFT's names around each method: its folder of `peft.tuners`, its model and layer classes. Data alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Named:
    """One method.

    Attributes:
        folder: Of `peft.tuners`.
        peft_type: Its entry in the registry.
        model: The tuner class, or the encoder class of a prompt method.
        layer: The class of its layers; empty where it has none.
        kinds: Further layer classes, one per kind of base layer.
        tensors: What an adapter keeps on a layer (`adapter_layer_names`).
        mixed: PEFT's `PeftMixedModel` takes it.
        named_config: Its config class, where that is not called as the model.
    """

    folder: str
    peft_type: str
    model: str
    layer: str = ""
    kinds: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    mixed: bool = False
    named_config: str = ""

    @property
    def config(self) -> str:
        """The name of its config class."""
        return self.named_config or self.model.removesuffix("Model") + "Config"


_LORA = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_LORA_KINDS = ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention", "ParamWrapper")
_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_GRALORA = ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general")
_HIRA = ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")
_CONVS = ("Linear", "Conv1d", "Conv2d")

PREFIXES = {  # how PEFT says that names of a method's tensors begin, where it is another beginning than ours
    "VERA": "vera_lambda_",
    "PVERA": "pvera_lambda_",
    "ADAPTION_PROMPT": "adaption_prompt_",
    "XLORA": "xlora_",
    **{
        name: f"{name.lower()}_"
        for name in ("CARTRIDGE", "CPT", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
    },
}

TUNERS = (
    Named("lora", "LORA", "LoraModel", "LoraLayer", _LORA_KINDS, _LORA, mixed=True),
    Named(
        "adalora",
        "ADALORA",
        "AdaLoraModel",
        "AdaLoraLayer",
        ("SVDLinear", "SVDConv2d"),
        ("lora_A", "lora_B", "lora_E"),
        True,
    ),
    Named("adamss", "ADAMSS", "AdamssModel", "AdamssLayer", ("Linear",), ("adamss_A", "adamss_B")),
    Named("adaption_prompt", "ADAPTION_PROMPT", "AdaptionPromptModel"),
    Named("beft", "BEFT", "BeftModel", "BeftLayer", ("Linear",), ("beft_bias",), True),
    Named("boft", "BOFT", "BOFTModel", "BOFTLayer", ("Linear", "Conv2d"), ("boft_R", "boft_s")),
    Named("c3a", "C3A", "C3AModel", "C3ALayer", ("C3ALinear",), ("c3a_kernel",)),
    Named("deft", "DEFT", "DeftModel", "DeftLayer", ("DeftLinear",), ("deft_P", "deft_R")),
    Named(
        "delora",
        "DELORA",
        "DeloraModel",
        "DeloraLayer",
        ("DeloraLinear",),
        ("delora_A", "delora_B", "delora_lambda"),
    ),
    Named(
        "fourierft",
        "FOURIERFT",
        "FourierFTModel",
        "FourierFTLayer",
        ("FourierFTLinear",),
        ("fourierft_spectrum",),
    ),
    Named("frod", "FROD", "FrodModel", "FrodLayer", ("Linear",), ("frod_lambda_l", "frod_lambda_s_values")),
    Named("glora", "GLORA", "GloraModel", "GloraLayer", ("GloraLinear",), tuple(f"glora_{x}" for x in "ABCDE")),
    Named("gralora", "GRALORA", "GraloraModel", "GraloraLayer", ("Linear",), _GRALORA),
    Named(
        "hira",
        "HIRA",
        "HiraModel",
        "HiraLayer",
        ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d"),
        _HIRA,
        True,
    ),
    Named("hra", "HRA", "HRAModel", "HRALayer", ("HRALinear", "HRAConv2d"), ("hra_u",)),
    Named("ia3", "IA3", "IA3Model", "IA3Layer", ("Linear", "Conv2d", "Conv3d"), ("ia3_l",), True),
    Named("lily", "LILY", "LilyModel", "LilyLayer", ("Linear",), ("lily_A", "lily_B", "lily_router")),
    Named("ln_tuning", "LN_TUNING", "LNTuningModel", "LNTuningLayer", (), ("ln_tuning_layers",)),
    Named("loha", "LOHA", "LoHaModel", "LoHaLayer", _CONVS, _HADA, True),
    Named("lokr", "LOKR", "LoKrModel", "LoKrLayer", _CONVS, _LOKR, True),
    Named("miss", "MISS", "MissModel", "MissLayer", ("MissLinear",), ("miss_block",)),
    Named("oft", "OFT", "OFTModel", "OFTLayer", ("Linear", "Conv2d", "Embedding"), ("oft_R", "oft_embedding_R")),
    Named("osf", "OSF", "OSFModel", "OSFLayer", ("Linear",), ("osf_svd_params",)),
    Named(
        "peanut",
        "PEANUT",
        "PeanutModel",
        "PeanutLayer",
        ("Linear",),
        tuple(f"peanut_{x}" for x in ("A", "B", "encoders", "decoders")),
    ),
    Named("poly", "POLY", "PolyModel", "PolyLayer", ("Linear",), ("poly_lora_A", "poly_lora_B", "poly_router")),
    Named("psoft", "PSOFT", "PsoftModel", "PsoftLayer", ("Linear",), ("psoft_R",)),
    Named("pvera", "PVERA", "PveraModel", "PveraLayer", ("Linear",), ("pvera_lambda_b", "pvera_lambda_d")),
    Named(
        "randlora",
        "RANDLORA",
        "RandLoraModel",
        "RandLoraLayer",
        ("Linear",),
        ("randlora_lambda", "randlora_gamma"),
    ),
    Named("road", "ROAD", "RoadModel", "RoadLayer", ("Linear",), ("road_theta", "road_alpha"), True),
    Named("shadow", "SHADOW", "ShadowModel"),
    Named("shira", "SHIRA", "ShiraModel", "ShiraLayer", ("Linear",), ("shira_weight",), True),
    Named(
        "supertuning",
        "SUPERTUNING",
        "SupertuningModel",
        "SupertuningLayer",
        ("Linear",),
        ("supertuning_values", "supertuning_lora_A", "supertuning_lora_B"),
    ),
    Named("tinylora", "TINYLORA", "TinyLoraModel", "TinyLoraLayer", ("Linear", "Embedding"), ("tinylora_v",)),
    Named(
        "trainable_tokens",
        "TRAINABLE_TOKENS",
        "TrainableTokensModel",
        "TrainableTokensLayer",
        (),
        ("trainable_tokens_delta",),
    ),
    Named("unilora", "UNILORA", "UniLoraModel", "UniLoraLayer", ("Linear",), ("unilora_theta_d",)),
    Named(
        "vblora",
        "VBLORA",
        "VBLoRAModel",
        "VBLoRALayer",
        ("Linear",),
        ("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"),
    ),
    Named("vera", "VERA", "VeraModel", "VeraLayer", ("Linear",), ("vera_lambda_b", "vera_lambda_d")),
    Named("waveft", "WAVEFT", "WaveFTModel", "WaveFTLayer", ("WaveFTLinear",), ("waveft_spectrum",)),
    Named("xlora", "XLORA", "XLoraModel"),
)

PROMPTS = (
    Named("cartridge", "CARTRIDGE", "CartridgeEncoder", named_config="CartridgeConfig"),
    Named("cpt", "CPT", "CPTEmbedding", named_config="CPTConfig"),
    Named(
        *("multitask_prompt_tuning", "MULTITASK_PROMPT_TUNING", "MultitaskPromptEmbedding"),
        named_config="MultitaskPromptTuningConfig",
    ),
    Named("p_tuning", "P_TUNING", "PromptEncoder", named_config="PromptEncoderConfig"),
    Named("prefix_tuning", "PREFIX_TUNING", "PrefixEncoder", named_config="PrefixTuningConfig"),
    Named("prompt_tuning", "PROMPT_TUNING", "PromptEmbedding", named_config="PromptTuningConfig"),
)
