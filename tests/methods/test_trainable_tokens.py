"""Trainable tokens: W'[t] = T[t] for the named tokens, every other row as it was; a tied head reads the same rows."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from deltatune.errors import ConfigError, PeftWarning, TargetError
from tests.core.tiny import batch, logits, tiny
from tests.laws.examples import move

TOKENS = [7, 2, 9]


def adapted(layer: nn.Module, shake: bool = True, **options):
    torch.manual_seed(0)
    config = TrainableTokensConfig(**{"token_indices": TOKENS, "target_modules": ["layer"], **options})
    model = get_peft_model(nn.ModuleDict({"layer": layer}).double(), config)
    if shake:
        move(model)
    wrapper = model.get_base_model()["layer"]
    return wrapper, wrapper.adapters["default"]


def test_rows_of_the_named_tokens_are_replaced_in_their_order():
    wrapper, adapter = adapted(nn.Embedding(11, 4))
    expected = wrapper.base_layer.weight.detach().clone()
    for row, token in enumerate(TOKENS):
        expected[token] = adapter.trainable_tokens_delta[row]
    ids = torch.arange(11).reshape(1, 11)
    assert_close(wrapper(ids)[0], expected)
    assert_close(wrapper.weight + 0, expected)
    assert not torch.allclose(expected[TOKENS], wrapper.base_layer.weight[TOKENS], atol=0.1)


def test_an_output_layer_gets_rows_of_its_own_and_keeps_its_bias():
    wrapper, adapter = adapted(nn.Linear(4, 11))
    weight = wrapper.base_layer.weight.detach().clone()
    weight[TOKENS] = adapter.trainable_tokens_delta.detach()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    assert_close(wrapper(x), x @ weight.T + wrapper.base_layer.bias)


def test_it_trains_tokens_times_width_and_starts_from_the_rows_that_are_there():
    wrapper, adapter = adapted(nn.Embedding(11, 4), shake=False)
    assert sum(p.numel() for p in adapter.parameters()) == 3 * 4
    assert torch.equal(adapter.trainable_tokens_delta, wrapper.base_layer.weight[TOKENS])
    wrapper, adapter = adapted(nn.Embedding(11, 4), shake=False, init_weights=False)
    assert not torch.allclose(adapter.trainable_tokens_delta, wrapper.base_layer.weight[TOKENS], atol=0.1)


def test_gradients_reach_the_named_rows_alone():
    wrapper, adapter = adapted(nn.Embedding(11, 4))
    wrapper(torch.tensor([[2, 2, 3]])).sum().backward()
    rows = adapter.trainable_tokens_delta.grad
    assert_close(rows, torch.tensor([[0.0], [2.0], [0.0]], dtype=torch.float64).expand(3, 4))


def test_a_padding_row_trains_no_more_than_torch_trains_it():
    wrapper, adapter = adapted(nn.Embedding(11, 4, padding_idx=2))
    wrapper(torch.tensor([2, 7])).sum().backward()
    assert adapter.trainable_tokens_delta.grad[1].abs().max() == 0 < adapter.trainable_tokens_delta.grad[0].abs().min()


def test_a_scaled_embedding_scales_the_new_rows_too():
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, x):
            return super().forward(x) * self.embed_scale

    wrapper, adapter = adapted(Scaled(11, 4))
    assert_close(wrapper(torch.tensor(7)), 3 * adapter.trainable_tokens_delta[0])
    assert_close(wrapper(torch.tensor(1)), 3 * wrapper.base_layer.weight[1])


@pytest.mark.parametrize("tokens", [[], [11], [-1], [3, 3]])
def test_tokens_that_are_not_there_are_refused(tokens):
    with pytest.raises(ConfigError, match="token_indices"):
        adapted(nn.Embedding(11, 4), token_indices=tokens)


def test_other_layers_are_refused():
    with pytest.raises(TargetError, match="Conv1d"):
        adapted(nn.Conv1d(11, 11, 2))
    with pytest.raises(TargetError, match="target_modules"):
        get_peft_model(nn.Sequential(nn.Embedding(11, 4)), TrainableTokensConfig(token_indices=TOKENS))


# ---------------------------------------------------------------------------------------------------- tied embeddings

EMBEDDING = {"gpt2": "transformer.wte", "t5": "shared", "bart": "model.shared", "llama": "model.embed_tokens"}
TIED = ("gpt2", "t5", "bart")


def written_by_hand(arch: str, rows: torch.Tensor):
    """The bare model with the rows put into its embedding, whose parameter the head shares where it is tied."""
    model = tiny(arch)
    with torch.no_grad():
        model.get_input_embeddings().weight[TOKENS] = rows
    return model


def tokens_model(arch: str, **options):
    torch.manual_seed(0)
    return move_and_return(get_peft_model(tiny(arch), TrainableTokensConfig(token_indices=TOKENS, **options)))


def move_and_return(model):
    move(model)
    return model.eval()


def rows_of(model) -> torch.Tensor:
    """What trains, which files repeat for each layer that follows."""
    (rows,) = {id(tensor): tensor for tensor in model.adapter_tensors("default").values()}.values()
    return rows.detach()


@pytest.mark.parametrize("arch", EMBEDDING)
def test_the_input_embedding_is_the_default_and_a_tied_head_follows(arch):
    model = tokens_model(arch)
    assert model.peft_config["default"].target_modules == {EMBEDDING[arch]}
    assert model.get_nb_trainable_parameters()[0] == len(TOKENS) * 16
    inputs, plain = batch(arch), written_by_hand(arch, rows_of(model))
    assert_close(logits(model, inputs), logits(plain, inputs), rtol=1e-5, atol=1e-5)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(tiny(arch), inputs))


def test_gradients_come_from_both_ends():
    model = tokens_model("gpt2")
    inputs, plain = batch("gpt2"), written_by_hand("gpt2", rows_of(model))
    model(**inputs).loss.backward()
    plain(**inputs).loss.backward()
    (rows,) = [p for p in model.parameters() if p.requires_grad]
    assert_close(rows.grad, plain.transformer.wte.weight.grad[TOKENS], rtol=1e-4, atol=1e-6)


def test_generation_uses_the_rows_at_both_ends():
    model = tokens_model("gpt2")
    plain = written_by_hand("gpt2", rows_of(model))
    ids = torch.tensor([[7, 5, 2, 9]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = plain.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    assert not torch.equal(tiny("gpt2").generate(ids, **options), expected)


@pytest.mark.parametrize("arch", TIED)
def test_a_merged_model_stays_tied(arch):
    model = tokens_model(arch)
    inputs = batch(arch)
    expected = logits(model, inputs)
    plain = model.merge_and_unload()
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert plain.config.tie_word_embeddings
    assert_close(logits(plain, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["gpt2", "bart"])
def test_rows_of_a_batch_with_other_tokens(arch):
    model = tokens_model(arch)
    model.add_adapter("other", TrainableTokensConfig(token_indices=[4, 7]))
    move(model, name="other")
    inputs = batch(arch, rows=3)
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=["default", "__base__", "other"]).logits
        for index, name in enumerate(["default", None, "other"]):
            if name is not None:
                model.set_adapter(name)
                assert_close(mixed[index], logits(model, inputs)[index], rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            assert_close(mixed[1], logits(model, inputs)[1], rtol=1e-4, atol=1e-5)


def test_of_two_active_adapters_the_later_replaces_what_both_name():
    model = tokens_model("gpt2")
    model.add_adapter("other", TrainableTokensConfig(token_indices=[4, 7]))
    move(model, name="other")
    model.set_adapter(["default", "other"])
    wte = model.get_base_model().transformer.wte
    first, second = (wte.trainable_tokens_delta[name] for name in ("default", "other"))
    assert_close(wte.weight[[7, 2, 9, 4]], torch.stack([second[1], first[1], first[2], second[0]]))
    assert_close(model.get_base_model().lm_head.weight + 0, wte.weight + 0)


def test_it_is_saved_and_loaded_for_both_ends(tmp_path):
    model = tokens_model("gpt2")
    assert set(model.adapter_tensors("default")) == {
        f"base_model.model.{layer}.trainable_tokens_delta" for layer in ("transformer.wte", "lm_head")
    }
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("gpt2"), tmp_path)
    assert torch.equal(logits(loaded, batch("gpt2")), logits(model, batch("gpt2")))
    assert torch.equal(rows_of(loaded), rows_of(model))


def test_an_embedding_does_not_follow_its_head():
    """As in PEFT: whoever names the head alone means the head alone."""
    model = tokens_model("gpt2", target_modules=["lm_head"])
    assert isinstance(model.get_base_model().transformer.wte, nn.Embedding)


def test_both_ends_named_train_one_set_of_rows():
    model = tokens_model("gpt2", target_modules=["wte", "lm_head"])
    base = model.get_base_model()
    assert base.lm_head.adapters["default"].T is base.transformer.wte.adapters["default"].T
    assert model.get_nb_trainable_parameters()[0] == len(TOKENS) * 16


def test_deleting_it_takes_both_wrappers_off():
    model = tokens_model("gpt2")
    model.delete_adapter("default")
    base = model.get_base_model()
    assert type(base.transformer.wte) is nn.Embedding and type(base.lm_head) is nn.Linear
    assert base.transformer.wte.weight is base.lm_head.weight


# ------------------------------------------------------------------------------------------------------- beside LoRA


def beside_lora(arch: str = "gpt2", **options):
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 2, "target_modules": ["c_attn"], "trainable_token_indices": TOKENS, **options})
    return move_and_return(get_peft_model(tiny(arch), config))


def test_lora_trains_tokens_too():
    model = beside_lora()
    base = model.get_base_model()
    own = {key: tensor for key, tensor in model.adapter_tensors("default").items() if "lora_" not in key}
    assert list(own) == ["base_model.model.transformer.wte.token_adapter.trainable_tokens_delta"]
    assert base.lm_head.adapters["default"].trainable_tokens_delta is base.transformer.wte.adapters["default"].T
    assert model.get_nb_trainable_parameters()[0] == len(TOKENS) * 16 + 2 * 2 * (16 + 48)
    assert model.peft_config["default"].target_modules == {"c_attn"}


def test_lora_with_tokens_of_several_layers(tmp_path):
    model = beside_lora(trainable_token_indices={"wte": [1, 2], "wpe": [0]})
    x = batch("gpt2")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("gpt2"), tmp_path)
    assert torch.equal(logits(loaded, x), logits(model, x))
    assert loaded.peft_config["default"].trainable_token_indices == {"wte": [1, 2], "wpe": [0]}


def test_tied_ends_with_other_tokens_each_train_on_their_own():
    model = beside_lora(trainable_token_indices={"wte": [1, 2], "lm_head": [3]})
    base = model.get_base_model()
    assert base.lm_head.adapters["default"].token_indices == [3]
    assert base.transformer.wte.adapters["default"].token_indices == [1, 2]
    model = beside_lora(trainable_token_indices={"wte": [1, 2], "lm_head": [1, 2]})
    assert sum("token_adapter" in key for key in model.adapter_tensors("default")) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["c_attn", "wte"]},
        {"target_modules": ["c_attn", "lm_head"]},
        {"modules_to_save": ["wte"]},
        {"trainable_token_indices": [61]},
        {"trainable_token_indices": [1, 1]},
        {"trainable_token_indices": {"wte": []}},
        {"trainable_token_indices": {"nowhere": [1]}},
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_and_leaves_the_model_bare(options):
    model = tiny("gpt2")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises((ConfigError, TargetError)):
        get_peft_model(
            model, LoraConfig(**{"r": 2, "target_modules": ["c_attn"], "trainable_token_indices": TOKENS, **options})
        )
    assert [name for name, _ in model.named_modules()] == names


def test_a_merge_of_lora_with_tokens_keeps_the_tie():
    model = beside_lora()
    expected = logits(model, batch("gpt2"))
    plain = model.merge_and_unload()
    assert plain.transformer.wte.weight is plain.lm_head.weight
    assert_close(logits(plain, batch("gpt2")), expected, rtol=1e-4, atol=1e-4)


def test_lora_on_a_tied_embedding_still_unties_and_says_so():
    model = get_peft_model(tiny("gpt2"), LoraConfig(r=2, target_modules=["wte"], init_lora_weights=False))
    with pytest.warns(PeftWarning, match="no longer share"):
        model.merge_and_unload()
