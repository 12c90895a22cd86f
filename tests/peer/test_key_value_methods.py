"""Methods that learn keys and values: the files of PEFT give its logits here, ours give our logits there."""

from __future__ import annotations

import warnings

import pytest
import torch

import deltatune
from deltatune import PeftModel, get_peft_model
from tests.prompts.models import KINDS, bare, batch
from tests.prompts.test_files import logits, read_by_peft, real

peft = pytest.importorskip("peft", reason="peft, the peer that these tests compare with, is not installed")

FOUR = ["gpt2", "llama", "bert", "t5"]


def moved(model, seed: int = 5):
    """Everything that trains, and the frozen rows of a cartridge, off their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.requires_grad or "frozen_embedding" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.6)
    return model.eval()


def theirs(name: str, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return moved(peft.get_peft_model(bare(name), config))


def close(found, expected, inputs) -> None:
    torch.testing.assert_close(real(found, inputs), real(expected, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("name", FOUR)
def test_a_cartridge_of_peft_gives_the_logits_of_peft(name, frozen, tmp_path):
    config = peft.CartridgeConfig(task_type=KINDS[name][1], num_virtual_tokens=4, num_frozen_tokens=frozen)
    model, inputs = theirs(name, config), batch(name)
    model.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(bare(name), tmp_path, is_trainable=True).eval()
    assert ours.peft_config["default"].layout == "peft"
    close(logits(ours, inputs), logits(model, inputs), inputs)
    assert ours.get_nb_trainable_parameters()[0] == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("name", FOUR)
def test_a_cartridge_in_the_layout_of_peft_gives_our_logits_in_peft(name, tmp_path):
    config = deltatune.CartridgeConfig(task_type=KINDS[name][1], num_virtual_tokens=4, layout="peft")
    model, inputs = moved(get_peft_model(bare(name), config)), batch(name)
    model.save_pretrained(tmp_path)
    other = read_by_peft(name, tmp_path)
    close(logits(other, inputs), logits(model, inputs), inputs)
    assert other.peft_config["default"].num_frozen_tokens == 1


def test_a_native_cartridge_makes_peft_raise_and_is_written_for_it_on_request(tmp_path):
    config = deltatune.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model, inputs = moved(get_peft_model(bare("llama"), config)), batch("llama")
    model.save_pretrained(tmp_path / "native")
    with pytest.raises(KeyError, match="prompt_embeddings"):
        read_by_peft("llama", tmp_path / "native")
    model.save_pretrained(tmp_path / "peft", format="peft")
    close(logits(read_by_peft("llama", tmp_path / "peft"), inputs), logits(model, inputs), inputs)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_cache_starts_a_cartridge_as_in_peft(name):
    ids = torch.tensor([[9, 33, 12, 40, 8]])
    with torch.no_grad():
        cache = bare(name)(input_ids=ids, use_cache=True).past_key_values
    other = theirs(name, peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    expected = peft.initialize_kv_prefix_from_past_key_values(other, past_key_values=cache)
    for layout in ("peft", "native"):
        config = deltatune.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, layout=layout)
        model, inputs = get_peft_model(bare(name), config).eval(), batch(name)
        rows = deltatune.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
        if layout == "peft":
            assert torch.equal(rows, expected)
        if layout == "peft" or name == "llama":  # natively, learned positions keep the tokens at 0
            close(logits(model, inputs), logits(other, inputs), inputs)
    found = deltatune.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=4)
    assert torch.equal(found, peft.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=4))


def test_cartridges_of_peft_are_composed_as_in_peft(tmp_path):
    for part, seed in (("a", 1), ("b", 2)):
        config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        moved(theirs("llama", config), seed).save_pretrained(tmp_path / part)
    paths, inputs = [tmp_path / "a", tmp_path / "b"], batch("llama")
    peft.compose_cartridge_adapters(paths, output_path=tmp_path / "theirs")
    deltatune.compose_cartridge_adapters(paths, output_path=tmp_path / "ours")
    expected = logits(read_by_peft("llama", tmp_path / "theirs"), inputs)
    close(logits(read_by_peft("llama", tmp_path / "ours"), inputs), expected, inputs)
    close(logits(PeftModel.from_pretrained(bare("llama"), tmp_path / "ours"), inputs), expected, inputs)
    assert PeftModel.from_pretrained(bare("llama"), tmp_path / "ours").peft_config["default"].num_frozen_tokens == 1


# ------------------------------------------------------------------------------------------------------- LLaMA-Adapter


def with_biased_output(name: str):
    """A Llama whose output projection has a bias, which PEFT adds twice."""
    import transformers

    from tests.prompts.models import LLAMA

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, attention_bias=True)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


MAKERS = {"gpt2": bare, "llama": bare, "mistral": bare, "biased": with_biased_output}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", MAKERS)
def test_prompts_of_peft_give_its_logits_and_go_back(name, layers, tmp_path):
    make, inputs = MAKERS[name], batch("llama")
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=layers)
    model = moved(peft.get_peft_model(make(name), config))
    model.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(make(name), tmp_path / "theirs")
    close(logits(ours, inputs), logits(model, inputs), inputs)
    assert ours.get_nb_trainable_parameters()[0] == 0
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of missing keys and of config fields that it does not know
        warnings.filterwarnings("ignore", category=FutureWarning)
        back = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
    close(logits(back, inputs), logits(model, inputs), inputs)


@pytest.mark.parametrize("name", MAKERS)
def test_native_prompts_are_read_by_peft_where_they_mean_the_same_and_raise_elsewhere(name, tmp_path):
    make, inputs = MAKERS[name], batch("llama")
    config = deltatune.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1)
    model = moved(get_peft_model(make(name), config))
    model.save_pretrained(tmp_path)
    if name in ("llama", "mistral"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = peft.PeftModel.from_pretrained(make(name), tmp_path).eval()
        close(logits(other, inputs), logits(model, inputs), inputs)
        model.save_pretrained(tmp_path / "peft", format="peft")
        loaded = PeftModel.from_pretrained(make(name), tmp_path / "peft")
        assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    else:
        with warnings.catch_warnings(), pytest.raises(RuntimeError, match="adaption_gate"):
            warnings.simplefilter("ignore")
            peft.PeftModel.from_pretrained(make(name), tmp_path)
        with pytest.raises(deltatune.PeftError, match="PEFT adds them elsewhere"):
            model.save_pretrained(tmp_path / "peft", format="peft")
