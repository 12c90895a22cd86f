"""Which attentions get a prefix: found by a probe that leaves no trace, refused clearly where there are none."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from deltatune import PrefixTuningConfig, get_peft_model
from deltatune.errors import ConfigError, PeftWarning, TargetError
from deltatune.prompts.sites import choose_sites, survey
from tests.prompts.models import BART, BERT, LLAMA, bare, batch, prefixed, redraw


def shapes(name: str, **settings) -> dict[str, list[int]]:
    config = prefixed(name, **settings).peft_config["default"]
    return dict(zip(config.site_names, config.site_shapes))


def test_key_and_value_shapes_come_from_the_attention_calls():
    assert shapes("llama") == {f"model.layers.{i}.self_attn": [2, 8, 2, 8] for i in range(2)}
    assert shapes("latent") == {f"model.layers.{i}.self_attn": [4, 16, 4, 12] for i in range(2)}
    assert shapes("hybrid") == {"model.layers.1.self_attn": [2, 8, 2, 8]}
    assert list(shapes("albert")) == ["albert.encoder.albert_layer_groups.0.albert_layers.0.attention"]


def test_sites_of_an_encoder_decoder_are_chosen_by_kind_name_or_pattern():
    own = [f"decoder.block.{i}.layer.0.SelfAttention" for i in range(2)]
    cross = [f"decoder.block.{i}.layer.1.EncDecAttention" for i in range(2)]
    encoder = [f"encoder.block.{i}.layer.0.SelfAttention" for i in range(2)]
    assert list(shapes("t5")) == own == list(shapes("t5", sites="self"))
    assert sorted(shapes("t5", sites="cross")) == cross
    assert sorted(shapes("t5", sites="encoder")) == encoder
    assert sorted(shapes("t5", sites="all")) == sorted(own + cross + encoder)
    assert list(shapes("t5", sites=r"decoder\.block\.1\..*SelfAttention")) == own[1:]
    assert sorted(shapes("t5", sites=["cross", own[0]])) == sorted([*cross, own[0]])
    assert list(shapes("bart")) == [f"model.decoder.layers.{i}.self_attn" for i in range(2)]


def test_a_base_without_weights_in_memory_is_probed_too():
    """t5-base, 20 virtual tokens: PEFT's count, without a byte of its 223 million parameters."""
    sizes = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12}
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    wrapped = get_peft_model(model, PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=20))
    assert wrapped.get_nb_trainable_parameters()[0] == 368_640


@pytest.mark.parametrize("name", ["mamba", "prophetnet"])
def test_a_model_that_no_prefix_can_reach_is_refused_and_left_as_it_was(name):
    model = bare(name)
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(TargetError, match=f"{type(model).__name__} \\('{name}'\\)"):
        prefixed(name, model)
    assert [dict(vars(module)) for module in model.modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_encoder_out_of_reach_matters_only_when_it_is_asked_for():
    settings = {**BART, "attention_window": 8, "max_encoder_position_embeddings": 64}
    model = transformers.LEDForConditionalGeneration(
        transformers.LEDConfig(**{**settings, "max_decoder_position_embeddings": 64})
    )

    def sites(wanted) -> set[str]:
        return {site.kind for site in choose_sites(model, wanted)}

    assert sites("default") == {"self"}
    with pytest.raises(TargetError, match=r"LEDEncoderSelfAttention at 'led\.encoder\.layers\.0.*1 more"):
        sites("encoder")
    with pytest.raises(TargetError, match=r"LEDEncoderSelfAttention at 'led\.encoder\.layers\.1"):
        sites(["self", "led.encoder.layers.1.self_attn.longformer_self_attn"])
    with pytest.warns(PeftWarning, match=r"LEDEncoderSelfAttention at 'led\.encoder\.layers\.0"):
        assert sites("all") == {"self", "cross"}


def test_attention_in_blocks_and_attention_through_the_interface_are_found_side_by_side():
    found = survey(bare("longt5"))
    assert [(site.kind, site.layout is not None) for site in found.sites] == [
        *[("encoder", True)] * 2,
        *[("self", False), ("cross", False)] * 2,
    ]
    assert found.unreached == []
    prefixed("longt5", sites="all")


@pytest.mark.parametrize("sites", ["crss", r"model\.layers\.9.*", ["self", "model.layers.0.self_atn"]])
def test_sites_that_match_nothing_are_refused_with_the_names_there_are(sites):
    with pytest.raises(TargetError, match=r"LlamaForCausalLM.*model\.layers\.0\.self_attn|cross"):
        prefixed("llama", sites=sites)


def test_fields_that_contradict_the_model_are_refused():
    with pytest.raises(ConfigError, match=r"num_layers=7 does not fit LlamaForCausalLM, which has 2"):
        prefixed("llama", num_layers=7)


@pytest.mark.parametrize("name", ["recurrent", "bert", "t5"])
def test_the_probe_leaves_no_trace(name):
    """Modes, buffers, what recurrent layers remember, the random state, and later results are those of before."""
    model, untouched = bare(name).train(), bare(name).train()
    model.get_submodule(next(name for name, _ in model.named_children())).eval()
    attributes = [dict(vars(module)) for module in model.modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    random = torch.get_rng_state()
    assert survey(model).sites
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(now, then) for now, then in zip(model.buffers(), buffers))
    assert torch.equal(torch.get_rng_state(), random)
    ids = torch.tensor([[5, 6, 7]])
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if name == "t5" else {})}
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, untouched.eval()(**inputs).logits)


def test_the_probe_suits_models_with_images_and_classifiers_that_need_an_end_token():
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = transformers.ViTForImageClassification(transformers.ViTConfig(**size, image_size=16, patch_size=4))
    assert len(survey(vision).sites) == 2
    bart = transformers.BartForSequenceClassification(transformers.BartConfig(**BART))
    assert {site.kind for site in survey(bart).sites} == {"encoder", "self", "cross"}


def test_a_head_with_inputs_of_its_own_and_an_encoder_alone_are_probed_too():
    several = transformers.BertForMultipleChoice(transformers.BertConfig(**BERT))
    assert [site.name for site in survey(several).sites] == [f"bert.encoder.layer.{i}.attention.self" for i in (0, 1)]
    settings = {**BART, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32}
    speech = transformers.WhisperForAudioClassification(transformers.WhisperConfig(**settings))
    assert [site.kind for site in survey(speech).sites] == ["self", "self"]


def test_a_router_with_a_softmax_is_no_attention():
    settings = {
        **LLAMA, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8, "mamba_expand": 2,
        "mamba_dt_rank": 4, "use_mamba_kernels": False,
    }  # fmt: skip
    found = survey(transformers.JambaForCausalLM(transformers.JambaConfig(**settings)))
    assert [site.name for site in found.sites] == ["model.layers.1.self_attn", "model.layers.3.self_attn"]
    assert found.unreached == []


def test_a_bare_module_is_refused():
    with pytest.raises(TargetError, match=r"Linear.*model of transformers"):
        get_peft_model(torch.nn.Linear(2, 2), PrefixTuningConfig(num_virtual_tokens=3))
    model = transformers.BertModel(transformers.BertConfig(**BERT))
    with pytest.raises(ConfigError, match="num_virtual_tokens"):
        get_peft_model(copy.deepcopy(model), PrefixTuningConfig())


def test_one_attention_to_own_tokens_and_those_of_the_encoder_is_self_attention():
    """T5Gemma 2: the decoder's keys are its own, and behind them those of the encoder."""
    model = prefixed("t5gemma2")
    assert model.peft_config["default"].site_names == [f"model.decoder.layers.{i}.self_attn" for i in range(2)]
    inputs = batch("t5gemma2")
    del inputs["decoder_input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False}
    found = model.generate(**inputs, **options)
    assert torch.equal(found, model.generate(**inputs, **options, use_cache=False))


_CHARACTERS = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "num_hash_buckets": 64,
}  # fmt: skip
_POOLING = {"vocab_size": 64, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1, 1, 1]}


@pytest.mark.parametrize(
    ("model_type", "settings"), [("canine", _CHARACTERS), ("funnel", {**_POOLING, "hidden_dropout": 0.0})]
)
def test_models_of_characters_and_models_that_pool_their_tokens_are_probed(model_type, settings):
    config = transformers.AutoConfig.for_model(model_type, num_labels=3, **settings)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    assert len(survey(model).sites) >= 2
    prefixed_model = get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=4)).eval()
    ids = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        redraw(prefixed_model, 1)
        one = prefixed_model(input_ids=ids).logits
        redraw(prefixed_model, 2)
        assert ((prefixed_model(input_ids=ids).logits - one).abs().amax(1) > 1e-5).all()


def test_a_softmax_with_a_backward_of_its_own_is_refused():
    """SEW-D: keys of a prefix would act and never be trained."""
    config = transformers.SEWDConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, squeeze_factor=1,
        conv_dim=(16, 16), conv_kernel=(8, 4), conv_stride=(4, 4), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, layerdrop=0.0,
    )  # fmt: skip
    model = transformers.SEWDForSequenceClassification(config)
    before = [set(vars(module)) for module in model.modules()]
    with pytest.raises(TargetError, match=r"SEWDForSequenceClassification.*DisentangledSelfAttention"):
        get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=4))
    assert [set(vars(module)) for module in model.modules()] == before
