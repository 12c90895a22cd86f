"""Forward passes with a prompt: the base on rows put together by hand, and the caller's tokens only."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tests.prompts.inputs import COUNT, batch, by_hand, model_of, prompted

DECODERS = ("gpt2", "llama", "qwen3", "mistral", "latent", "hybrid", "mamba", "bloom")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize("name", [*DECODERS, "recurrent"])
def test_a_decoder_sees_the_rows_before_the_tokens(name):
    model, ids = prompted(name), batch(name)["input_ids"][:1]
    with torch.no_grad():
        found = model(input_ids=ids).logits
        expected = by_hand(name, model, ids).logits
    assert found.shape[1] == ids.shape[1]
    torch.testing.assert_close(found, expected[:, COUNT:], **CLOSE)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, model_of(name)(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["t5", "longt5", "bart"])
def test_an_encoder_sees_the_rows_and_a_decoder_its_tokens(name):
    model, inputs = prompted(name), batch(name)
    ids, targets = inputs["input_ids"][:1], inputs["decoder_input_ids"][:1]
    with torch.no_grad():
        found = model(input_ids=ids, decoder_input_ids=targets)
        expected = by_hand(name, model, ids, decoder_input_ids=targets)
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    assert found.encoder_last_hidden_state.shape[1] == ids.shape[1]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "bert", "roberta", "t5", "bart", "bert-tokens", "gpt2-class", "llama-class", "bart-class"]
)
def test_padding_does_not_change_real_tokens(name, left):
    if left and name in ("bert", "roberta", "t5", "bart", "bert-tokens", "bart-class"):
        pytest.skip("positions of these models count padding on the left, with and without a prompt")
    model, inputs = prompted(name), batch(name, left=left)
    if left and name in ("gpt2", "gpt2-class", "llama", "llama-class"):
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    part = slice(3, None) if left else slice(None, 5)
    alone = {key: tensor[1:] if key == "decoder_input_ids" else tensor[1:, part] for key, tensor in inputs.items()}
    with torch.no_grad():
        together, single = model(**inputs).logits[1:], model(**alone).logits
    if together.ndim == 3 and "decoder_input_ids" not in inputs:
        together = together[:, part]
    torch.testing.assert_close(together, single, **CLOSE)


@pytest.mark.parametrize("name", ["gpt2-class", "llama-class", "bart-class"])
def test_classifiers_read_their_answer_off_the_last_real_token(name):
    """PEFT hands embeddings over instead of ids: the class is read off the padding, or not at all."""
    model, inputs = prompted(name), batch(name)
    with torch.no_grad():
        found = model(**inputs, labels=torch.tensor([0, 2]))
        alone = model(input_ids=inputs["input_ids"][1:, :5]).logits
    assert found.logits.shape == (2, 3)
    torch.testing.assert_close(found.logits[1:], alone, **CLOSE)
    torch.testing.assert_close(found.loss, functional.cross_entropy(found.logits, torch.tensor([0, 2])), **CLOSE)


@pytest.mark.parametrize("name", ["bert-tokens", "t5-tokens"])
def test_labels_of_tokens_meet_their_tokens(name):
    model, inputs = prompted(name), batch(name)
    labels = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"] % 3, -100)
    with torch.no_grad():
        found = model(**inputs, labels=labels)
    assert found.logits.shape == (2, 8, 3)
    torch.testing.assert_close(
        found.loss, functional.cross_entropy(found.logits.flatten(0, 1), labels.flatten()), **CLOSE
    )


@pytest.mark.parametrize("name", ["bert-answers", "t5-answers"])
def test_answers_are_where_the_caller_says(name):
    """PEFT leaves the positions where they were, P tokens before the answer."""
    model, inputs = prompted(name), batch(name)
    starts, ends = torch.tensor([2, 1]), torch.tensor([4, 9])  # the last is beyond the tokens and does not count
    with torch.no_grad():
        found = model(**inputs, start_positions=starts, end_positions=ends)
        as_tuple = model(**inputs, start_positions=starts, end_positions=ends, return_dict=False)
    assert found.start_logits.shape == (2, 8)
    expected = (
        functional.cross_entropy(found.start_logits, starts),
        functional.cross_entropy(found.end_logits[:1], ends[:1]),
    )
    torch.testing.assert_close(found.loss, sum(expected) / 2, **CLOSE)
    assert torch.equal(as_tuple[0], found.loss) and torch.equal(as_tuple[1], found.start_logits)


def test_features_are_those_of_the_tokens():
    model, inputs = prompted("bert-features"), batch("bert-features")
    with torch.no_grad():
        found = model(**inputs, token_type_ids=torch.zeros_like(inputs["input_ids"]), output_hidden_states=True)
        expected = by_hand("bert-features", model, inputs["input_ids"][:1]).last_hidden_state[:, COUNT:]
    torch.testing.assert_close(found.last_hidden_state[:1], expected, **CLOSE)
    assert [state.shape for state in found.hidden_states] == [(2, 8, 32)] * 3


def test_losses_of_a_decoder_count_every_labelled_token():
    """The last virtual token predicts the first real one, so all labels count, as with PEFT."""
    model, ids = prompted("llama"), batch("llama")["input_ids"][:1]
    with torch.no_grad():
        found = model(input_ids=ids, labels=ids).loss
        logits = by_hand("llama", model, ids).logits[:, COUNT - 1 : -1]
    torch.testing.assert_close(found, functional.cross_entropy(logits[0], ids[0]), **CLOSE)


def test_inputs_of_other_kinds_say_the_same():
    model, inputs = prompted("llama"), batch("llama")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    causal = torch.ones(8, 8, dtype=torch.bool).tril() & mask[:, None, None].bool()
    with torch.no_grad():
        expected = model(**inputs).logits
        embeds = model.get_base_model().get_input_embeddings()(ids)
        found = {
            "positional": model(ids, mask).logits,
            "embeds": model(inputs_embeds=embeds, attention_mask=mask).logits,
            "four dimensions": model(input_ids=ids, attention_mask=causal).logits,
            "positions": model(**inputs, position_ids=torch.arange(8)[None]).logits,
            "tuple": model(**inputs, return_dict=False)[0],
            "bare": model.get_base_model()(**inputs).logits,
        }
        kept = model(input_ids=ids[:1], logits_to_keep=2).logits
        picked = model(input_ids=ids[:1], logits_to_keep=torch.tensor([1, 7])).logits
    real = mask.bool()
    for what, logits in found.items():
        torch.testing.assert_close(logits[real], expected[real], **CLOSE, msg=what)
    torch.testing.assert_close(kept, expected[:1, 6:], **CLOSE)
    torch.testing.assert_close(picked, expected[:1, [1, 7]], **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "mamba", "hybrid"])
def test_decoding_by_hand_with_the_returned_cache_agrees(name):
    model, ids = prompted(name), batch(name)["input_ids"][:1]
    cache = "cache_params" if name == "mamba" else "past_key_values"
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        out = model(input_ids=ids[:, :5], use_cache=True)
        found = [out.logits]
        for index in range(5, 8):
            mask = {} if name == "mamba" else {"attention_mask": torch.ones(1, index + 1, dtype=torch.long)}
            out = model(input_ids=ids[:, index : index + 1], **{cache: out[cache]}, use_cache=True, **mask)
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, **CLOSE)


def test_a_decoder_beside_an_encoder_goes_on_by_hand():
    model, inputs = prompted("t5", "multitask", num_transformer_submodules=2), batch("t5")
    targets = inputs.pop("decoder_input_ids")
    with torch.no_grad():
        whole = model(**inputs, decoder_input_ids=targets).logits
        first = model(**inputs, decoder_input_ids=targets[:, :3], use_cache=True)
        hand = {"encoder_outputs": (first.encoder_last_hidden_state,), "attention_mask": inputs["attention_mask"]}
        rest = model(**hand, decoder_input_ids=targets[:, 3:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, **CLOSE)
