"""Left padding: rows answer as they do without it, also where nobody tells the model where its tokens stand."""

from __future__ import annotations

import pytest
import torch
import transformers

from deltatune import PrefixTuningConfig, get_peft_model
from deltatune.prompts.padding import without_padding
from tests.prompts.modalities import DECODER, VISION, qwen2_vl
from tests.prompts.models import bare, batch, prefixed, redraw

NEW = 4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "mistral", "latent", "gemma2", "gptj"])
def test_a_plain_call_answers_as_without_padding(name, attention):
    """Where the bare model does so, which rotary angles tell of distances only."""
    if name in ("gemma2", "gptj") and attention == "sdpa":
        pytest.skip("transformers runs it with eager attention")
    model, inputs = prefixed(name, bare(name, attention)), batch(name, left=True)
    with torch.no_grad():
        padded = model(**inputs).logits[1, 3:]
        alone = model(input_ids=inputs["input_ids"][1:, 3:]).logits[0]
    torch.testing.assert_close(padded, alone, atol=2e-5, rtol=1e-5)


def test_positions_of_time_height_and_width_start_at_the_first_token():
    """Qwen2-VL tells its angles three positions of each token, which count columns where there are no images."""
    base, _, _ = qwen2_vl()
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = get_peft_model(base.eval(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    redraw(model.eval())
    inputs = batch("llama", left=True)
    with torch.no_grad():
        padded = model(**inputs).logits[1, 3:]
        alone = model(input_ids=inputs["input_ids"][1:, 3:]).logits[0]
    torch.testing.assert_close(padded, alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("late", [True, False])
def test_a_forward_that_was_wrapped_is_told_the_same(late):
    """By hooks of other libraries, before or after; a plain wrapper does not say what it takes."""
    base = bare("llama")
    rotary = base.model.rotary_emb

    def wrap(inner):
        rotary.forward = lambda *args, **kwargs: inner(*args, **kwargs)

    if not late:
        wrap(rotary.forward)
    model, inputs = prefixed("llama", base), batch("llama", left=True)
    if late:
        wrap(rotary.forward)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, prefixed("llama")(**inputs).logits)


def test_padding_by_position_and_by_keyword_is_one_call():
    model, inputs = prefixed("llama"), batch("llama", left=True)
    with torch.no_grad():
        by_name = model(**inputs).logits
        assert torch.equal(model.get_base_model()(inputs["input_ids"], inputs["attention_mask"]).logits, by_name)


def test_positions_that_the_caller_gives_stay():
    """Further away from the prefix, as asked for."""
    model, inputs = prefixed("llama"), batch("llama", left=True)
    with torch.no_grad():
        asked = model(**inputs, position_ids=torch.arange(8)[None]).logits[1, 3:]
        alone = model(
            input_ids=inputs["input_ids"][1:, 3:], position_ids=torch.arange(3, 8)[None], use_cache=True
        ).logits[0]
        default = model(**inputs).logits[1, 3:]
    torch.testing.assert_close(asked, alone, atol=2e-5, rtol=1e-5)
    assert (asked - default).abs().max() > 0.01


def test_decoding_by_hand_over_a_padded_cache_goes_on_from_the_first_token():
    model, inputs = prefixed("llama"), batch("llama", left=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        first = model(input_ids=ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
        steps = [first.logits]
        for column in (6, 7):
            step = model(
                input_ids=ids[:, column : column + 1],
                attention_mask=mask[:, : column + 1],
                past_key_values=first.past_key_values,
            )
            steps.append(step.logits)
        alone = model(input_ids=ids[1:, 3:]).logits[0]
    torch.testing.assert_close(torch.cat(steps, dim=1)[1, 3:], alone, atol=2e-5, rtol=1e-5)


def test_a_model_that_counts_padding_while_it_generates():
    """It throws away the positions that generate() worked out from the mask."""

    class Counting(transformers.LlavaForConditionalGeneration):
        def prepare_inputs_for_generation(self, *args, **kwargs):
            return {**super().prepare_inputs_for_generation(*args, **kwargs), "position_ids": None}

    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        text_config=DECODER, vision_config={"model_type": "clip_vision_model", **VISION}, image_token_index=60
    )
    model = Counting(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    redraw(model.eval())
    inputs = batch("llama", left=True)
    padded = model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    row = {name: tensor[1:, 3:] for name, tensor in inputs.items()}
    alone = model.generate(**row, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True)
    for found, expected in zip(padded.logits, alone.logits):
        torch.testing.assert_close(found[1:], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_compiled_call_is_one_graph_and_the_same():
    model, inputs = prefixed("llama"), batch("llama", left=True)
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)


def test_pefts_layout_stays_pefts():
    """A file of PEFT's was trained at the positions that PEFT gives."""
    model, inputs = prefixed("llama", layout="peft"), batch("llama", left=True)
    with torch.no_grad():
        default = model(**inputs).logits
        assert torch.equal(default, model(**inputs, position_ids=torch.arange(8)[None]).logits)


def test_taken_off_it_leaves_nothing_behind():
    plain = prefixed("llama").unload()
    assert not any(module._forward_pre_hooks for module in plain.modules())


def test_only_positions_that_count_columns_move():
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    assert without_padding(torch.arange(4)[None], mask).tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert without_padding(torch.tensor([[3]]), mask).tolist() == [[3], [1]]  # one step of decoding
    own = torch.tensor([[0, 1, 2, 3], [1, 1, 0, 1]])
    assert torch.equal(without_padding(own, mask), own)
    leaping = torch.tensor([[0, 1, 2, 3], [1, 1, 0, 3]])  # by chance its last one is the last column
    assert torch.equal(without_padding(leaping, mask), leaping)
    of_three = torch.stack([torch.arange(4)[None].expand(2, 4)] * 3)
    assert torch.equal(without_padding(of_three, mask), torch.stack([without_padding(of_three[0], mask)] * 3))
