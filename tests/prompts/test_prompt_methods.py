"""Each method's equation, written plainly from its paper, its start and its number of parameters."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from deltatune import (
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from deltatune.errors import ConfigError, MismatchError
from deltatune.prompts.cpt import project, weighted_loss
from tests.prompts.inputs import COUNT, batch, by_hand, model_of, prompted


def encoder_of(config, name: str = "llama"):
    return get_peft_model(model_of(name), config).prompt_encoder["default"]


def test_prompt_tuning_trains_one_row_per_virtual_token():
    model = prompted("llama")
    assert model.get_nb_trainable_parameters()[0] == COUNT * 32
    assert prompted("t5").get_nb_trainable_parameters()[0] == COUNT * 32  # before the encoder's tokens
    assert prompted("albert").get_nb_trainable_parameters()[0] == COUNT * 16 + 3 * 32 + 3  # narrow tokens, and the head


def test_a_prompt_starts_as_real_tokens():
    table = model_of("llama").get_input_embeddings().weight
    ids = [7, 8, 9]
    for count, expected in ((2, [7, 8]), (3, [7, 8, 9]), (7, [7, 8, 9, 7, 8, 9, 7])):
        config = PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=count, prompt_tuning_init="TEXT", prompt_tuning_init_token_ids=ids
        )
        assert torch.equal(encoder_of(config).embedding.weight, table[expected])
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB")
    for row in encoder_of(config).embedding.weight:
        assert (table == row).all(dim=1).any()


def test_a_prompt_starts_as_text(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"say": 11, "it": 12, "?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path)
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="say it",
        tokenizer_name_or_path=str(tmp_path),
        tokenizer_kwargs={"trust_remote_code": True},  # not passed on
    )
    table = model_of("llama").get_input_embeddings().weight
    assert torch.equal(encoder_of(config).embedding.weight, table[[11, 12, 11]])


def test_a_prompt_of_real_tokens_is_that_text():
    """X' = [E(c); X]: the logits are those of the text in full."""
    ids, text = batch("llama")["input_ids"][:1], [5, 9, 3, 8]
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prompt_tuning_init="TEXT", prompt_tuning_init_token_ids=text
    )
    model = get_peft_model(model_of("llama"), config).eval()
    with torch.no_grad():
        expected = model_of("llama")(torch.cat([torch.tensor([text]), ids], dim=1)).logits[:, 4:]
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_p_tuning_is_an_mlp_of_an_embedding():
    encoder = prompted("llama", "mlp", encoder_hidden_size=10).prompt_encoder["default"]
    (a, _, b, _, c), rows = encoder.mlp_head, encoder.embedding.weight
    expected = (((rows @ a.weight.T + a.bias).relu() @ b.weight.T + b.bias).relu()) @ c.weight.T + c.bias
    torch.testing.assert_close(encoder(), expected)
    assert sum(p.numel() for p in encoder.parameters()) == 4 * 32 + (32 * 10 + 10) + (10 * 10 + 10) + (10 * 32 + 32)


def test_p_tuning_is_an_mlp_of_a_bidirectional_lstm():
    encoder = prompted("llama", "lstm", encoder_num_layers=1, encoder_hidden_size=6).prompt_encoder["default"]
    lstm, rows = encoder.lstm_head, encoder.embedding.weight

    def read(sequence, suffix):
        hidden, cell, found = torch.zeros(6), torch.zeros(6), []
        for x in sequence:
            gates = x @ getattr(lstm, f"weight_ih_l0{suffix}").T + getattr(lstm, f"bias_ih_l0{suffix}")
            gates = gates + hidden @ getattr(lstm, f"weight_hh_l0{suffix}").T + getattr(lstm, f"bias_hh_l0{suffix}")
            i, f, g, o = gates.chunk(4)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            found.append(hidden)
        return torch.stack(found)

    both = torch.cat([read(rows, ""), read(rows.flip(0), "_reverse").flip(0)], dim=1)
    a, _, b = encoder.mlp_head
    expected = (both @ a.weight.T + a.bias).relu() @ b.weight.T + b.bias
    torch.testing.assert_close(encoder(), expected, atol=1e-5, rtol=1e-5)


def test_a_folded_p_tuning_answers_the_same_and_is_kept_while_nothing_changes(tmp_path):
    model, inputs = prompted("llama", "lstm"), batch("llama")
    prompt = model.prompts["default"]
    with torch.no_grad():
        expected = model(**inputs).logits
        assert prompt.rows(None, 2) is prompt.rows(None, 2)
        prompt.load_file_tensors({"prompt_embeddings": prompt.file_tensors()["prompt_embeddings"]})  # as PEFT's files
        assert model.prompt_encoder["default"].lstm_head is None
        assert torch.equal(model(**inputs).logits, expected)
        next(model.prompt_encoder.parameters()).add_(1.0)
        assert not torch.equal(model(**inputs).logits, expected)


def test_multitask_prompts_are_scaled_by_a_low_rank_of_their_task():
    model = prompted("llama", "multitask", num_tasks=3, num_ranks=2)
    encoder, inputs = model.prompt_encoder["default"], batch("llama")
    shared, u, v = encoder.embedding.weight, encoder.prefix_task_cols, encoder.prefix_task_rows
    assert (shared.shape, u.shape, v.shape) == ((4, 32), (3, 4, 2), (3, 2, 32))
    tasks = torch.tensor([2, 0])
    expected = torch.stack([shared * sum(torch.outer(u[t, :, r], v[t, r]) for r in range(2)) for t in (2, 0)])
    torch.testing.assert_close(encoder(task_ids=tasks), expected)
    with torch.no_grad():
        both = model(**inputs, task_ids=tasks).logits
        embeds = torch.cat([expected[:1], model_of("llama").get_input_embeddings()(inputs["input_ids"][:1])], dim=1)
        torch.testing.assert_close(
            both[:1], model_of("llama")(inputs_embeds=embeds).logits[:, 4:], atol=1e-5, rtol=1e-5
        )


def test_multitask_prompts_start_from_source_tasks(tmp_path):
    source = prompted("llama", "multitask", num_tasks=3, num_ranks=2)
    source.save_pretrained(tmp_path)
    was = source.prompt_encoder["default"]
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "num_ranks": 2, "prompt_tuning_init_task": 1}
    options["prompt_tuning_init_state_dict_path"] = str(tmp_path / "adapter_model.safetensors")

    def start(init, **more):
        return encoder_of(MultitaskPromptTuningConfig(**{**options, "prompt_tuning_init": init, **more}))

    mean, exact, shared = (
        start("AVERAGE_SOURCE_TASKS"),
        start("EXACT_SOURCE_TASK"),
        start("ONLY_SOURCE_SHARED", num_tasks=2),
    )
    for made in (mean, exact, shared):
        assert torch.equal(made.embedding.weight, was.embedding.weight)
    torch.testing.assert_close(mean.prefix_task_cols[0], was.prefix_task_cols.mean(0))
    torch.testing.assert_close(mean.prefix_task_rows[0], was.prefix_task_rows.mean(0))
    assert torch.equal(exact.prefix_task_cols[0], was.prefix_task_cols[1])
    assert shared.prefix_task_cols.shape[0] == 2 and shared.prefix_task_cols.std() < 0.05  # drawn anew
    with pytest.raises(ConfigError, match="0 to 2"):
        start("EXACT_SOURCE_TASK", prompt_tuning_init_task=3)
    with pytest.raises(MismatchError, match="num_ranks"):
        start("EXACT_SOURCE_TASK", num_ranks=1)


def test_context_aware_prompts_stay_in_their_balls():
    types = [1, 2, 3, 4, 0]
    config = CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=[5, 6, 7, 8, 9],
        cpt_tokens_type_mask=types,
        opt_projection_epsilon=3.0,
        opt_projection_format_epsilon=2.0,
    )
    model = get_peft_model(model_of("llama"), config).train()
    encoder, table = model.prompt_encoder["default"], model_of("llama").get_input_embeddings().weight
    assert model.get_nb_trainable_parameters()[0] == 5 * 32
    assert torch.equal(encoder(), table[[5, 6, 7, 8, 9]])
    inputs = {**batch("llama"), "labels": batch("llama")["input_ids"]}
    optimizer = torch.optim.SGD([encoder.delta_embedding.weight], lr=1e3)
    model(**inputs).loss.backward()
    assert (encoder.delta_embedding.weight.grad[3:] == 0).all()  # labels and untyped tokens do not move
    optimizer.step()
    with torch.no_grad():
        model(**inputs)
        moved = (encoder() - table[[5, 6, 7, 8, 9]]).norm(dim=1)
    root = (32 / 2048) ** 0.5
    torch.testing.assert_close(moved, torch.tensor([2.0, 3.0, 2.0, 0.0, 0.0]) * root, atol=1e-5, rtol=1e-4)
    inside = torch.tensor([[0.3, 0.4], [0.0, 0.0]])
    assert torch.equal(project(inside, torch.tensor([[1.0], [1.0]])), inside)


@pytest.mark.parametrize("adapter", ["default", "other"])  # PEFT's loss knows adapters named "default" only
def test_the_loss_of_context_aware_prompts_weighs_examples_by_age(adapter):
    config = CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=[5, 6, 7, 8, 9, 10, 11],
        cpt_tokens_type_mask=[2, 3, 4, 4, 6, 7, 8],
        opt_weighted_loss_type="decay",
        opt_loss_decay_factor=0.5,
    )
    model = get_peft_model(model_of("llama"), config, adapter_name=adapter).eval()
    ids = batch("llama")["input_ids"][:1]
    types = torch.tensor([[1, 2, 2, 2, 2, 3, 4, 4]])
    with torch.no_grad():
        found = model(input_ids=ids, labels=ids, input_type_mask=types).loss
        text = torch.cat([torch.tensor([config.cpt_token_ids]), ids], dim=1)
        said = model_of("llama")(text).logits[0].log_softmax(-1)
    labels = {2: 0.25, 3: 0.25, 6: 0.5, 13: 1.0, 14: 1.0}  # position -> weight, the caller's own example being the last
    expected = -sum(weight * said[i - 1, text[0, i]] for i, weight in labels.items()) / len(labels)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert types.max() == 4  # not written to
    flat = weighted_loss(said[None], text, torch.full_like(text, 4), 1.0)
    torch.testing.assert_close(flat, functional.cross_entropy(said[:-1], text[0, 1:]))


def test_the_second_half_of_pefts_prompts_for_t5_is_carried_along(tmp_path):
    """PEFT gives prompt tuning of encoder-decoders two halves and uses the first."""
    model = prompted("t5", num_transformer_submodules=2)
    inputs = {key: tensor[:1] for key, tensor in batch("t5").items() if key != "attention_mask"}
    assert model.prompt_encoder["default"].embedding.weight.shape == (8, 32)
    with torch.no_grad():
        found = model(**inputs).logits
        expected = by_hand("t5", model, inputs["input_ids"], decoder_input_ids=inputs["decoder_input_ids"]).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(model_of("t5"), tmp_path).prompt_encoder["default"]().shape == (8, 32)


def test_an_mlp_has_three_layers_whatever_is_asked():
    with pytest.warns(UserWarning, match="encoder_num_layers"):
        encoder_of(PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_num_layers=4))
