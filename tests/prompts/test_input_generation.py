"""Generation with a prompt: the base's answer to [P; X], and nobody outside sees virtual tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria

from deltatune.errors import StateError
from tests.prompts.inputs import COUNT, batch, prompted
from tests.prompts.models import bare

NEW = 6
DECODERS = ("gpt2", "llama", "mistral", "mamba", "hybrid", "recurrent", "bloom")


def question(name: str) -> dict[str, torch.Tensor]:
    inputs = batch(name, left=name not in ("t5", "bart"))
    return {key: inputs[key] for key in ("input_ids", "attention_mask")}


def generate(model, inputs, **options) -> list[list[int]]:
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **options})[:, -NEW:].tolist()


def step_by_step(model, ids, targets=None) -> list[int]:
    """Greedy decoding by plain forward passes over one row without padding."""
    found = []
    for _ in range(NEW):
        given = {"input_ids": ids} if targets is None else {"input_ids": ids, "decoder_input_ids": targets}
        with torch.no_grad():
            token = model(**given).logits[0, -1].argmax().view(1, 1)
        found.append(token.item())
        ids, targets = (torch.cat([ids, token], 1), None) if targets is None else (ids, torch.cat([targets, token], 1))
    return found


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_generation_is_the_argmax_of_forward_passes(name):
    model, inputs = prompted(name), question(name)
    found = generate(model, inputs)
    assert model.generate(**inputs, max_new_tokens=NEW).shape == (2, 8 + NEW)
    assert torch.equal(model.generate(**inputs, max_new_tokens=NEW)[:, :8], inputs["input_ids"])
    assert generate(model, inputs, use_cache=False) == found
    rows = ((0, 0), (1, 3)) if name not in ("mamba", "hybrid", "recurrent") else ((0, 0),)
    for row, padding in rows:
        assert step_by_step(model, inputs["input_ids"][row : row + 1, padding:]) == found[row]


@pytest.mark.parametrize("method", ["prompt", "multitask"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_generate_as_they_are_trained(name, method):
    """PEFT's multitask prompts stand before the decoder's tokens in training only."""
    model, inputs = prompted(name, method), question(name)
    found = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert found.shape == (2, 1 + NEW)
    start = found[:1, :1]
    for row, tokens in ((0, 8), (1, 5)):
        assert step_by_step(model, inputs["input_ids"][row : row + 1, :tokens], start) == found[row, 1:].tolist()
    assert generate(model, inputs, use_cache=False) == found[:, 1:].tolist()
    beams = generate(model, inputs, num_beams=3)
    assert beams == generate(model, inputs, num_beams=3, use_cache=False)


def test_caches_of_every_kind_agree():
    model, inputs = prompted("llama"), question("llama")
    expected = generate(model, inputs)
    assert generate(model, inputs, cache_implementation="static") == expected
    assert generate(model, inputs, prefill_chunk_size=3) == expected
    assert generate(model, inputs, past_key_values=DynamicCache()) == expected
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    assert generate(model, one, prompt_lookup_num_tokens=2) == expected[:1]
    assert generate(model, one, assistant_model=model.get_base_model().__class__(model.config).eval()) == expected[:1]
    beams = generate(model, inputs, num_beams=3)
    assert beams == generate(model, inputs, num_beams=3, use_cache=False)
    embeds = model.get_base_model().get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    assert generate(model, given) == expected


def test_a_conversation_goes_on_from_its_cache():
    model, inputs = prompted("llama"), question("llama")
    ids, cache = inputs["input_ids"][:1], DynamicCache()
    whole = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    part = model.generate(ids, max_new_tokens=2, do_sample=False, past_key_values=cache)
    assert torch.equal(model.generate(part, max_new_tokens=NEW - 2, do_sample=False, past_key_values=cache), whole)


def test_lengths_count_the_callers_tokens():
    model, ids = prompted("llama"), question("llama")["input_ids"][:1]
    assert model.generate(ids, max_length=11, do_sample=False).shape == (1, 11)
    assert model.generate(ids, do_sample=False).shape == (1, 28)  # 20 new ones, when nothing is said
    assert model.generate(max_new_tokens=3, do_sample=False).shape == (1, 4)  # from the start token
    embeds = model.get_base_model().get_input_embeddings()(ids)
    assert model.generate(inputs_embeds=embeds, max_length=11, do_sample=False).shape == (1, 3)


class Seen(LogitsProcessor, StoppingCriteria):
    def __init__(self) -> None:
        self.prompts: list = []

    def __call__(self, input_ids, scores, **_):
        self.prompts.append(input_ids.clone())
        return scores if isinstance(scores, torch.Tensor) else torch.zeros(len(input_ids), dtype=torch.bool)


class Stop(Seen, StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        self.prompts.append(input_ids.clone())
        return torch.full((len(input_ids),), input_ids.shape[1] >= 10)


class Stream:
    def __init__(self) -> None:
        self.parts: list = []

    def put(self, value):
        self.parts.append(value.reshape(-1).tolist())

    def end(self):
        self.parts.append("end")


def test_nobody_outside_sees_virtual_tokens():
    model, ids = prompted("llama"), question("llama")["input_ids"][:1]
    processor, stop, stream, asked = Seen(), Stop(), Stream(), []

    def allowed(row, tokens):
        asked.append(len(tokens))
        return list(range(64))

    options = {"logits_processor": [processor], "stopping_criteria": [stop], "streamer": stream}
    found = model.generate(ids, do_sample=False, prefix_allowed_tokens_fn=allowed, max_new_tokens=NEW, **options)
    assert found.shape == (1, 10)
    assert [part.shape[1] for part in processor.prompts] == [8, 9] == asked
    assert torch.equal(stop.prompts[-1], found)
    assert stream.parts == [ids[0].tolist(), [found[0, 8].item()], [found[0, 9].item()], "end"]


def test_processors_of_transformers_do_not_see_them_either():
    """Repeated placeholders would be an n-gram; a minimal length would count them."""
    model, ids = prompted("llama"), question("llama")["input_ids"][:1]
    wished = int(ids[0, 0])
    head = model.get_base_model().lm_head
    with torch.no_grad():
        head.weight.zero_()
        head.weight[wished] = 1e-9  # nearly flat
    with torch.no_grad():
        head.bias = torch.nn.Parameter(torch.zeros(64))
        head.bias[wished] = 5.0
        head.bias[2] = 6.0
    plain = model.generate(ids, do_sample=False, max_new_tokens=4, eos_token_id=2, min_new_tokens=3)
    assert plain[0, 8:].tolist() == [wished] * 3 + [2]
    apart = model.generate(ids, do_sample=False, max_new_tokens=2, no_repeat_ngram_size=2, bad_words_ids=[[2]])
    assert apart[0, 8:].tolist() == [wished, wished]  # the second makes the first pair of them


def test_outputs_in_full_hold_the_callers_tokens():
    model, inputs = prompted("llama", base=bare("llama", "eager")), question("llama")
    wanted = {"output_hidden_states": True, "output_attentions": True, "return_dict_in_generate": True}
    for use_cache in (True, False):
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=use_cache, **wanted)
        lengths = [8, 1, 1] if use_cache else [8, 9, 10]
        assert out.sequences.shape == (2, 11)
        assert [step[0].shape[1] for step in out.hidden_states] == lengths
        assert [step[0].shape[2] for step in out.attentions] == lengths
        assert out.attentions[0][0].shape[3] == 8 + COUNT


def test_task_ids_go_along_with_beams_and_samples():
    model, inputs = prompted("llama", "multitask", num_tasks=3), question("llama")
    tasks = torch.tensor([2, 0])
    found = generate(model, inputs, task_ids=tasks, num_beams=2)
    for row in range(2):
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        assert generate(model, one, task_ids=tasks[row : row + 1], num_beams=2) == found[row : row + 1]


def test_what_runs_the_model_twice_is_refused():
    with pytest.raises(StateError, match="guidance_scale"):
        prompted("llama").generate(**question("llama"), guidance_scale=2.0)
