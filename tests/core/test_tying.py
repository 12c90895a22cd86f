"""`ensure_weight_tying`: adapters and copies of an embedding, and of the layers that share its weight."""

import pytest
import torch
from torch.testing import assert_close

from deltatune import LoraConfig, PeftModel, get_peft_model
from deltatune.copies import TrainedCopies
from deltatune.errors import ConfigError
from deltatune.tying import TiedLoRA
from tests.core.tiny import batch, logits, tiny

ENDS = {"llama": ("embed_tokens", "lm_head"), "gpt2": ("wte", "lm_head"), "bart": ("shared", "lm_head")}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def base(arch="llama"):
    return tiny(arch, tie_word_embeddings=True) if arch == "llama" else tiny(arch)


def moved(model, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def adapted(arch="llama", tie=True, **options):
    config = LoraConfig(**{"r": 2, "target_modules": [ENDS[arch][0]], "ensure_weight_tying": tie, **options})
    return moved(get_peft_model(base(arch), config))


@pytest.mark.parametrize("arch", ENDS)
@pytest.mark.parametrize("end", [[0], [1], [0, 1]], ids=str)
def test_both_ends_are_the_same_changed_matrix(arch, end):
    model = adapted(arch, target_modules=[ENDS[arch][index] for index in end])
    one = model.get_input_embeddings()
    other = model.get_output_embeddings()
    assert isinstance(other.adapters["default"], TiedLoRA)
    assert_close(one.weight + 0, other.weight + 0)
    x = torch.randn(3, 16)
    assert_close(other(x), torch.nn.functional.linear(x, one.weight + 0, other.bias), **CLOSE)
    assert model.get_nb_trainable_parameters()[0] == 2 * (61 + 16)


@pytest.mark.parametrize("arch", ENDS)
def test_merging_keeps_the_weight_shared(arch):
    model, inputs = adapted(arch), batch(arch)
    expected = logits(model, inputs)
    model.merge_adapter()
    assert_close(logits(model, inputs), expected, **CLOSE)
    model.unmerge_adapter()
    assert torch.equal(logits(model, inputs), expected)
    merged = model.merge_and_unload()
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert_close(logits(merged, inputs), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:the merged embedding")
def test_without_it_the_embedding_alone_is_adapted_and_merging_is_right_too():
    model, inputs = adapted(tie=False), batch("llama")
    assert not isinstance(getattr(model.get_output_embeddings(), "adapters", None), torch.nn.ModuleDict)
    expected = logits(model, inputs)
    merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    assert_close(logits(merged, inputs), expected, **CLOSE)


def test_disabling_and_unloading():
    model, inputs = adapted(), batch("llama")
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(base(), inputs))
    assert torch.equal(logits(model.unload(), inputs), logits(base(), inputs))


@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}], ids=str)
def test_saving_and_loading(options, tmp_path):
    model, inputs = adapted(**options), batch("llama")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits(again, inputs), logits(model, inputs))


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_modules_trained_whole_are_one_copy(names):
    model, inputs = adapted(target_modules=["q_proj"], modules_to_save=names), batch("llama")
    one, other = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(one, TrainedCopies) and isinstance(other, TrainedCopies)
    assert one.weight is other.weight and one.original_module.weight is other.original_module.weight
    expected = logits(model, inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(base(), inputs))
    merged = model.merge_and_unload()
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert_close(logits(merged, inputs), expected, **CLOSE)


def test_without_it_copies_are_apart():
    model = adapted(tie=False, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight


def test_dropout_and_gradients_reach_both_uses():
    model = adapted(lora_dropout=0.5).train()
    model(**batch("llama")).loss.backward()
    adapter = model.get_input_embeddings().adapters["default"]
    head, x = model.get_output_embeddings(), torch.randn(3, 16)
    assert not torch.equal(head(x), head(x)), "the update of the output layer has the dropout too"
    assert adapter.lora_A.weight.grad.abs().min() > 0  # every token is a class of the output


def test_tokens_of_layers_that_share_a_weight_have_to_agree():
    chosen = {"embed_tokens": [1, 2], "lm_head": [1, 3]}
    with pytest.raises(ConfigError, match="different tokens"):
        adapted(target_modules=["q_proj"], trainable_token_indices=chosen)
    same = {"embed_tokens": [1, 2], "lm_head": [1, 2]}
    model = adapted(target_modules=["q_proj"], trainable_token_indices=same)
    assert_close(model.get_input_embeddings().weight + 0, model.get_output_embeddings().weight + 0)


def test_nothing_to_tie_is_said():
    with pytest.warns(UserWarning, match="no layer of the model shares"):
        get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True))
    with pytest.warns(UserWarning, match="neither target_modules nor modules_to_save"):
        get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"], ensure_weight_tying=True))


def test_a_pattern_as_target(tmp_path):
    model = adapted(target_modules=r".*(q_proj|lm_head)")
    assert isinstance(model.get_output_embeddings().adapters["default"], TiedLoRA)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits(PeftModel.from_pretrained(base(), tmp_path), batch("llama")), logits(model, batch("llama"))
    )
