"""Options of loading and saving: each does what it says, or is answered."""

import json
import shutil
import warnings
import zipfile

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import deltatune
from deltatune import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    LoraRuntimeConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    loading,
    set_peft_model_state_dict,
)
from deltatune.errors import ConfigError, IntegrityError, MismatchError, PeftWarning, SaveError, StateError, UnsafeError
from deltatune.hotswap import hotswap_adapter
from deltatune.lora import options as lora_options
from tests.core.test_storage import CONFIG, INPUTS, KEY, WEIGHTS, adapted, change, load
from tests.core.tiny import VOCAB, logits, tiny
from tests.laws.examples import move

peft = pytest.importorskip("peft", reason="peft, the peer that these tests compare with, is not installed")


@pytest.fixture
def folder(tmp_path):
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def equal(one, other):
    return torch.equal(logits(one, INPUTS), logits(other, INPUTS))


def near(one, other):
    """PEFT's and ours, which sum layer and update in another order."""
    return torch.allclose(logits(one, INPUTS), logits(other, INPUTS), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- keys


def test_a_mapping_is_applied_to_keys_without_their_root_and_the_first_that_is_found_wins(folder):
    change(folder, lambda t: {k.replace("model.model.model.layers", "model.model.old.stack"): v for k, v in t.items()})
    mapping = {r"^old\.stack": "model.layers", r"model": "never"}
    assert equal(load(folder, key_mapping=mapping), adapted())
    expected = peft.utils.save_and_load.load_peft_weights(str(folder), device="cpu", key_mapping=mapping)
    found = load_peft_weights(folder, device="cpu", key_mapping=mapping)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_a_mapping_that_is_no_regular_expression_is_named(folder):
    with pytest.raises(ConfigError, match=r"key_mapping: '\(' -> 'x'"):
        load(folder, key_mapping={"(": "x"})


def llava():
    text = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision)
    ).eval()


def test_renames_that_transformers_knows_of_the_base_are_made_by_themselves(tmp_path):
    """Adapters of vision-language models from before transformers moved their layers."""
    model = get_peft_model(llava(), LoraConfig(target_modules=["q_proj"]))
    move(model)
    model.save_pretrained(tmp_path)
    moves = {"model.model.model.language_model.": "model.model.language_model.model."}
    moves |= {"model.model.model.vision_tower": "model.model.vision_tower"}
    old = load_file(tmp_path / WEIGHTS)
    for new, before in moves.items():
        old = {key.replace(new, before): value for key, value in old.items()}
    assert not old.keys() & load_file(tmp_path / WEIGHTS).keys()
    save_file(old, tmp_path / WEIGHTS)
    loaded = PeftModel.from_pretrained(llava(), tmp_path)
    expected, found = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert all(torch.equal(found[key], value) for key, value in expected.items()) and len(found) == len(expected)


# ------------------------------------------------------------------------------------------------------------- meta


def test_an_adapter_without_numbers_waits_for_them_and_says_so():
    model = get_peft_model(tiny("llama"), LoraConfig(task_type="CAUSAL_LM", r=4), low_cpu_mem_usage=True)
    own = [p for name, p in model.named_parameters() if "lora_" in name]
    assert own and all(parameter.is_meta for parameter in own)
    state = get_peft_model_state_dict(adapted())
    with pytest.warns(PeftWarning, match="missing"), pytest.raises(MismatchError, match="made without numbers"):
        set_peft_model_state_dict(model, {key: value for key, value in state.items() if key != KEY})
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    assert equal(model.eval(), adapted())
    assert all(p.requires_grad and not p.is_meta for name, p in model.named_parameters() if "lora_" in name)


def test_what_has_no_numbers_is_not_saved(tmp_path):
    model = get_peft_model(tiny("llama"), LoraConfig(r=4), low_cpu_mem_usage=True)
    with pytest.raises(SaveError, match="no numbers yet"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_injected_without_numbers_and_filled(tmp_path):
    base = inject_adapter_in_model(LoraConfig(r=4), tiny("llama"), low_cpu_mem_usage=True)
    state = {key.removeprefix("base_model.model."): v for key, v in get_peft_model_state_dict(adapted()).items()}
    set_peft_model_state_dict(base, state, low_cpu_mem_usage=True)
    assert equal(base, adapted())


def test_loading_without_initialising_draws_no_random_number(folder):
    base = tiny("llama")
    before = torch.get_rng_state()
    loaded = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)
    assert torch.equal(torch.get_rng_state(), before)
    loaded.load_adapter(folder, "second", low_cpu_mem_usage=True)
    assert torch.equal(torch.get_rng_state(), before) and equal(loaded, adapted())


def test_a_failed_load_without_initialising_leaves_nothing(folder):
    change(folder, lambda t: {k: v for k, v in t.items() if k != KEY})
    base = tiny("llama")
    with pytest.raises(MismatchError, match="1 missing"):
        PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)
    assert torch.equal(logits(base, INPUTS), logits(tiny("llama"), INPUTS))


# --------------------------------------------------------------------------------------------------------------- sizes


def test_tensors_of_other_sizes_are_left_out_where_that_is_allowed(folder):
    change(folder, lambda t: {**t, KEY: torch.randn(7, 16)})
    with pytest.raises(MismatchError, match="has shape"):
        load(folder)
    for low in (False, True):
        with pytest.warns(PeftWarning, match=rf"1 tensors of other shapes .*{KEY} \(7, 16\) for \(4, 16\)"):
            model = load(folder, ignore_mismatched_sizes=True, low_cpu_mem_usage=low)
        assert not any(p.is_meta for p in model.parameters())
        found, expected = get_peft_model_state_dict(model), get_peft_model_state_dict(adapted())
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == [KEY]
    model = adapted(1)
    with pytest.warns(PeftWarning, match="other shapes"):
        assert model.load_adapter(folder, "second", ignore_mismatched_sizes=True).missing_keys == [KEY]
    change(folder, lambda t: {k: v for k, v in t.items() if "v_proj" not in k})
    with pytest.warns(PeftWarning), pytest.raises(MismatchError, match="6 missing"):
        load(folder, ignore_mismatched_sizes=True)


def test_a_state_dict_of_other_sizes_likewise():
    model, state = adapted(1), get_peft_model_state_dict(adapted())
    with pytest.warns(PeftWarning):
        told = set_peft_model_state_dict(model, {**state, KEY: torch.zeros(1)}, ignore_mismatched_sizes=True)
    assert told.missing_keys == [KEY] and told.unexpected_keys == []


# ---------------------------------------------------------------------------------------------------------- embeddings


def grown(folder, extra=4, seed=0):
    """A base from its own folder, with more tokens than it had."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    model.resize_token_embeddings(VOCAB + extra)
    return model


def bare(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def base(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


EMBEDDINGS = {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}


def trained(model, **options):
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **options)).eval()
    move(model)
    return model


def test_embeddings_go_with_the_adapter_where_the_vocabulary_was_changed(base, tmp_path):
    model = trained(grown(base))
    model.save_pretrained(tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / WEIGHTS).keys() >= EMBEDDINGS
    loaded = PeftModel.from_pretrained(grown(base, seed=9), tmp_path / "adapter")
    assert equal(loaded, model), "the new rows, which were drawn anew, are those of the file"
    with pytest.raises(MismatchError, match=r"resize_token_embeddings\(65\)"):
        PeftModel.from_pretrained(bare(base), tmp_path / "adapter")
    assert near(peft.PeftModel.from_pretrained(grown(base, seed=9), str(tmp_path / "adapter")), model)


def test_peft_reads_and_writes_the_same_embeddings(base, tmp_path):
    theirs = peft.get_peft_model(grown(base), peft.LoraConfig(task_type="CAUSAL_LM", r=2)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    assert load_file(tmp_path / "theirs" / WEIGHTS).keys() >= EMBEDDINGS
    assert near(PeftModel.from_pretrained(grown(base, seed=9), tmp_path / "theirs"), theirs)


def test_an_unchanged_vocabulary_is_left_in_the_base_unless_asked(base, tmp_path):
    model = trained(
        transformers.AutoModelForCausalLM.from_pretrained(base).eval(), target_modules=["embed_tokens", "q_proj"]
    )
    model.save_pretrained(tmp_path / "auto")
    assert not any("base_layer" in key or "lm_head" in key for key in load_file(tmp_path / "auto" / WEIGHTS))
    model.save_pretrained(tmp_path / "asked", save_embedding_layers=True)
    keys = load_file(tmp_path / "asked" / WEIGHTS).keys()
    assert "base_model.model.model.embed_tokens.base_layer.weight" in keys and "base_model.model.lm_head.weight" in keys
    for name in ("auto", "asked"):
        assert equal(PeftModel.from_pretrained(bare(base), tmp_path / name), model)
    trained(grown(base)).save_pretrained(tmp_path / "never", save_embedding_layers=False)
    assert not load_file(tmp_path / "never" / WEIGHTS).keys() & EMBEDDINGS
    with pytest.raises(ConfigError, match="save_embedding_layers='yes'"):
        model.save_pretrained(tmp_path / "new", save_embedding_layers="yes")
    assert not (tmp_path / "new").exists()


def test_the_vocabulary_is_judged_without_the_network(tmp_path, monkeypatch):
    import socket

    def refused(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    model = trained(tiny("llama"))
    for name in ("someone/somewhere", "gpt2", "/nowhere", "http://x/y", "a" * 300):
        model.peft_config["default"].base_model_name_or_path = name
        model.save_pretrained(tmp_path / "adapter")
        assert not load_file(tmp_path / "adapter" / WEIGHTS).keys() & EMBEDDINGS


def test_no_file_replaces_an_embedding_of_a_base_that_was_not_changed(base, tmp_path):
    trained(bare(base)).save_pretrained(tmp_path / "a", save_embedding_layers=True)
    change(tmp_path / "a", lambda t: {k: v + (k in EMBEDDINGS) for k, v in t.items()})
    model = bare(base)
    with pytest.raises(UnsafeError, match="load_embedding_layers=True"):
        PeftModel.from_pretrained(model, tmp_path / "a")
    assert torch.equal(logits(model, INPUTS), logits(bare(base), INPUTS))
    loaded = PeftModel.from_pretrained(model, tmp_path / "a", load_embedding_layers=True)
    assert torch.equal(loaded.get_input_embeddings().weight, bare(base).get_input_embeddings().weight + 1)
    state = load_file(tmp_path / "a" / WEIGHTS)
    other = trained(bare(base))
    with pytest.warns(PeftWarning, match="unexpected"):
        assert set(set_peft_model_state_dict(other, state).unexpected_keys) == EMBEDDINGS
    assert torch.equal(other.get_input_embeddings().weight, bare(base).get_input_embeddings().weight)


def test_a_prefix_on_a_grown_base_takes_its_embeddings_along(base, tmp_path):
    model = get_peft_model(grown(base), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    move(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(grown(base, seed=9), tmp_path / "adapter")
    assert equal(loaded, model)


# -------------------------------------------------------------------------------------------------------- older format


def test_the_older_format_is_written_on_request_and_checked_like_the_newer(folder, tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "old", safe_serialization=False)
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == ["README.md", CONFIG, "adapter_model.bin"]
    file = tmp_path / "old" / "adapter_model.bin"
    assert torch.load(file, weights_only=True).keys() == load_file(folder / WEIGHTS).keys()
    assert equal(load(tmp_path / "old"), model)
    assert near(peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "old")), model)
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        place = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    content[place.header_offset + 200] ^= 1
    file.write_bytes(content)
    with pytest.raises((IntegrityError, deltatune.errors.FormatError)):
        load(tmp_path / "old")


def test_one_format_takes_the_place_of_the_other(folder, monkeypatch):
    adapted(1).save_pretrained(folder, safe_serialization=False)
    assert not (folder / WEIGHTS).exists() and equal(load(folder), adapted(1))
    adapted(2).save_pretrained(folder)
    assert not (folder / "adapter_model.bin").exists() and equal(load(folder), adapted(2))


def test_a_stop_before_the_stale_file_is_gone_leaves_no_doubt(folder, tmp_path):
    shutil.copy(folder / WEIGHTS, tmp_path / "stale")
    adapted(1).save_pretrained(folder, safe_serialization=False)
    shutil.copy(tmp_path / "stale", folder / WEIGHTS)
    assert equal(load(folder), adapted(1))
    (folder / WEIGHTS).write_bytes(b"another")
    with pytest.raises(UnsafeError, match="nothing says which"):
        load(folder)


# --------------------------------------------------------------------------------------------------------------- others


def test_options_that_are_none_are_warned_about_and_torch_device_is_checked(folder, tmp_path):
    with pytest.warns(PeftWarning, match=r"\['nonsense'\] are no options"):
        load(folder, nonsense=1, device_map="auto")
    with pytest.warns(PeftWarning, match=r"\['compress'\]"):
        adapted().save_pretrained(tmp_path / "new", compress=True, max_shard_size="1GB")
    for device in ("nowhere", "meta", "cuda:99"):
        with pytest.raises(ConfigError, match=f"torch_device='{device}'"):
            adapted().load_adapter(folder, "second", torch_device=device)
        with pytest.raises(ConfigError, match=f"torch_device='{device}'"):
            load(folder, torch_device=device)
        with pytest.raises(ConfigError, match=f"torch_device='{device}'"):
            hotswap_adapter(adapted(), folder, "default", torch_device=device)
    assert equal(load(folder, torch_device="cpu"), adapted())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_tensors_are_read_to_the_device_that_is_asked_for(folder, monkeypatch):
    seen, plain = [], loading.load_into
    monkeypatch.setattr(
        loading, "load_into", lambda *args: seen.extend(t.device.type for t in args[2].tensors.values()) or plain(*args)
    )
    assert equal(load(folder, torch_device="cuda"), adapted())
    assert set(seen) == {"cuda"}


def test_an_offload_that_changes_nothing_is_warned_about(folder, tmp_path, monkeypatch):
    with pytest.warns(PeftWarning, match="ephemeral_gpu_offload=True is for the lengths that DoRA"):
        assert equal(load(folder, ephemeral_gpu_offload=True), adapted())
    get_peft_model(tiny("llama"), IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "ia3")
    with pytest.warns(PeftWarning, match="not for IA3Config; it changes nothing"):
        load(tmp_path / "ia3", ephemeral_gpu_offload=True)
    monkeypatch.setattr(lora_options, "accelerator", lambda: None)
    config = LoraConfig(use_dora=True, r=2, runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True))
    with pytest.warns(PeftWarning, match="needs an accelerator"):
        get_peft_model(tiny("llama"), config)


def test_doras_lengths_are_worked_out_on_the_accelerator(monkeypatch):
    """Numbers that are sent to the device without any do not come back."""
    monkeypatch.setattr(lora_options, "accelerator", lambda: torch.device("meta"))
    with pytest.raises(NotImplementedError, match="meta"):
        get_peft_model(tiny("llama"), LoraConfig(use_dora=True, r=2, runtime_config={"ephemeral_gpu_offload": True}))
    get_peft_model(tiny("llama"), LoraConfig(use_dora=True, r=2))


def test_a_state_dict_given_to_save_is_what_is_saved(tmp_path):
    model = adapted()
    doubled = {key: 2 * value for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=doubled)
    saved, own = load_file(tmp_path / WEIGHTS), get_peft_model_state_dict(model)
    assert all(torch.equal(saved[key], 2 * value) for key, value in own.items())


def test_only_the_main_process_writes(tmp_path):
    adapted().save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


def test_loading_leaves_the_modes_that_peft_leaves(folder):
    model = adapted().train()
    model.load_adapter(folder, "second")
    assert not model.training and not any(p.requires_grad for n, p in model.named_parameters() if "second" in n)
    model.load_adapter(folder, "third", is_trainable=True)
    assert all(p.requires_grad for n, p in model.named_parameters() if "third" in n)


def test_the_revision_of_the_base_is_kept_in_the_config_and_used(base, tmp_path, monkeypatch):
    model = get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM"), revision="v3"
    )
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["revision"] == "v3"
    asked = {}

    def noted(name, **options):
        asked.update(options)
        return transformers.LlamaForCausalLM.from_pretrained(name)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", noted)
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", torch_dtype="float32", low_cpu_mem_usage=True)
    assert asked == {"revision": "v3", "torch_dtype": "float32"}


def test_auto_models_make_room_for_the_tokens_beside_the_adapter(base, tmp_path, shared):
    model = trained(grown(base))
    model.save_pretrained(tmp_path / "adapter")
    from tokenizers import Tokenizer, models

    words = {f"w{index}": index for index in range(VOCAB + 4)}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))
    ).save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert equal(loaded, model)
    assert torch.allclose(logits(loaded.merge_and_unload(), INPUTS), logits(model, INPUTS), atol=1e-5)


def test_a_class_that_a_file_names_is_imported_only_where_allowed(base, tmp_path):
    model = get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "adapter")
    assert isinstance(
        AutoPeftModel.from_pretrained(tmp_path / "adapter").get_base_model(), transformers.LlamaForCausalLM
    )
    values = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    values["auto_mapping"] = {"base_model_class": "Booby", "parent_library": "tests.core.booby_trap"}
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"import_allowlist=\['tests.core.booby_trap'\]"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")
    values["auto_mapping"] = {"base_model_class": "tiny", "parent_library": "tests.core.tiny"}
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(values))
    with pytest.raises(ConfigError):  # a function, and not allowed
        AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["tests.core.tiny"])
    with pytest.raises(StateError, match="from_pretrained"):
        AutoPeftModel()
