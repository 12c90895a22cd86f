"""aLoRA against arXiv 2504.12397: the base up to the last occurrence of the invocation tokens, LoRA from there.

So keys and values of the tokens before are the base's, and a cache of the base serves.
"""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import LoraConfig, PeftModel, PromptTuningConfig, call_values, get_peft_model, inject_adapter_in_model
from deltatune.calls import readers
from deltatune.errors import ConfigError, DataError, MergeError
from tests.core.tiny import tiny
from tests.laws.examples import move

CALL, OTHER = [7, 8], [9]
TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
START = {0: 5, 1: 7, 2: 9}  # of the rows of `ids`: after an earlier occurrence, at the end, nowhere


def ids() -> torch.Tensor:
    torch.manual_seed(1)
    rows = torch.randint(10, 60, (3, 9))
    rows[0, 1:3] = rows[0, 5:7] = rows[1, 7:9] = torch.tensor(CALL)
    rows[2, 4] = CALL[0]
    return rows


def adapted(arch: str = "llama", **options) -> PeftModel:
    torch.manual_seed(0)
    options = {"r": 3, "target_modules": TARGETS, "alora_invocation_tokens": CALL, "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(tiny(arch), LoraConfig(**options)).eval()
    move(model, 0.3)
    return model


def by_hand(model: PeftModel, starts: dict[int, int]):
    """The base, to the output of whose layers the update is added from a column on."""
    base = tiny("llama")
    wrapped = dict(model.get_base_model().named_modules())
    for path, module in base.named_modules():
        if path.rpartition(".")[2] in TARGETS:
            lora = wrapped[path].adapters["default"]

            def hook(module, args, output, lora=lora):
                update = lora.scaling * (args[0] @ lora.A.T @ lora.B.T)
                for row, start in starts.items():
                    output[row, start:] += update[row, start:]
                return output

            module.register_forward_hook(hook)
    return base


def test_it_acts_from_the_last_occurrence_on_and_before_is_the_base_to_the_bit():
    model, inputs = adapted(), ids()
    with torch.no_grad():
        got = model(input_ids=inputs).logits
        assert_close(got, by_hand(model, START)(input_ids=inputs).logits, rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            base = model(input_ids=inputs).logits
    for row, start in START.items():
        assert torch.equal(got[row, :start], base[row, :start])
        assert start == 9 or not torch.allclose(got[row, start:], base[row, start:], atol=1e-3)


def test_padding_on_the_left_moves_the_place_along():
    model, inputs = adapted(), ids()
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[:, :3] = 0
    padded = torch.cat([torch.zeros(3, 3, dtype=torch.long), inputs], dim=1)
    with torch.no_grad():
        got = model(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)).logits[:, 3:]
        assert_close(got, model(input_ids=inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_generation_with_a_cache_is_that_without(arch, settings):
    model = adapted(arch, target_modules="all-linear")
    inputs = ids()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(inputs)}
    cached = model.generate(input_ids=inputs, **options, **settings)
    assert torch.equal(cached, model.generate(input_ids=inputs, **options, **settings, use_cache=False))
    assert torch.equal(cached, model.generate(inputs, **options, **settings))
    with model.disable_adapter():
        base = model.generate(input_ids=inputs, **options, **settings)
    copies = settings.get("num_return_sequences", 1)
    assert torch.equal(cached[2 * copies :], base[2 * copies :]) and not torch.equal(cached, base)


def test_what_is_generated_does_not_invoke_it():
    """The prompt decides: the tokens of an answer, the invocation tokens among them, are the adapter's or are not."""
    model, inputs = adapted(), ids()[2:]
    forced = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(inputs)}
    with model.disable_adapter():
        base = model.generate(input_ids=inputs, **forced)
    spoken = base[0, 9:11].tolist()
    other = adapted(alora_invocation_tokens=spoken)
    assert torch.equal(other.generate(input_ids=inputs, **forced), base)


def test_a_cache_of_the_base_serves():
    model, inputs = adapted(), ids()[:2]
    with torch.no_grad():
        whole = model(input_ids=inputs).logits
        with model.disable_adapter():
            cache = model(input_ids=inputs[:, :5], use_cache=True).past_key_values
        rest = model(input_ids=inputs[:, 5:], past_key_values=cache).logits
    assert_close(rest, whole[:, 5:], rtol=1e-5, atol=1e-5)


def test_behind_a_cache_that_may_hide_an_invocation_the_caller_says_what_it_is():
    model, inputs = adapted(), ids()[:2]
    with torch.no_grad():
        whole = model(input_ids=inputs).logits

        def part(**more):
            cache = model(input_ids=inputs[:, :8], use_cache=True).past_key_values
            return model(input_ids=inputs[:, 8:], past_key_values=cache, **more).logits

        with pytest.raises(DataError, match=r"earlier tokens are in a cache; pass alora_offsets=\[\.\.\.\]"):
            part()
        assert_close(part(alora_offsets=[1, 0])[0], whole[0, 8:], rtol=1e-5, atol=1e-5)
    wrong = model(input_ids=inputs[:, 8:], alora_offsets=[0, 0]).logits
    with model.disable_adapter():
        assert torch.equal(wrong, model(input_ids=inputs[:, 8:]).logits)


def test_embedded_tokens_need_to_be_told():
    model, inputs = adapted(), ids()
    embedded = model.get_input_embeddings()(inputs)
    with pytest.raises(DataError, match="alora_offsets"):
        model(inputs_embeds=embedded)
    offsets = [9 - start for start in START.values()]
    got = model(inputs_embeds=embedded, alora_offsets=offsets).logits
    assert_close(got, model(input_ids=inputs).logits)
    assert_close(model(input_ids=inputs, alora_offsets=torch.tensor(offsets)).logits, got)
    with model.disable_adapter():
        model(inputs_embeds=embedded)  # nobody asks


def test_rows_of_a_batch_have_their_own_adapters_and_invocations():
    model, inputs = adapted(), ids()
    inputs[1, 3] = OTHER[0]
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS, alora_invocation_tokens=OTHER))
    model.add_adapter("plain", LoraConfig(r=2, target_modules=TARGETS))
    move(model, 0.3, "other"), move(model, 0.3, "plain")
    rows = torch.stack([inputs[0], inputs[1], inputs[0], inputs[1], inputs[1]])
    names = ["default", "other", "plain", "default", "__base__"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        mixed = model(input_ids=rows, adapter_names=names).logits
        answers = model.generate(
            input_ids=rows, adapter_names=names, num_beams=2, attention_mask=torch.ones_like(rows), **options
        )
        for index, name in enumerate(names):
            row = rows[index : index + 1]
            model.set_adapter(name) if name != "__base__" else model.disable_adapter_layers()
            assert_close(mixed[index], model(input_ids=row).logits[0], rtol=1e-5, atol=1e-5)
            alone = model.generate(input_ids=row, num_beams=2, attention_mask=torch.ones_like(row), **options)
            assert torch.equal(answers[index], alone[0])


def test_several_active_adapters_act_each_from_its_own_place():
    model, inputs = adapted(), ids()[:1]
    inputs[0, 3] = OTHER[0]
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS, alora_invocation_tokens=OTHER))
    move(model, 0.3, "other")
    with torch.no_grad():
        model.set_adapter("other")
        other = model(input_ids=inputs).logits
        model.set_adapter(["default", "other"])
        both = model(input_ids=inputs).logits
        generated = model.generate(input_ids=inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
        without = model.generate(input_ids=inputs, max_new_tokens=3, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(both[:, :5], other[:, :5]) and not torch.allclose(both[:, 5:], other[:, 5:], atol=1e-3)
    assert torch.equal(generated, without)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"use_qalora": True, "qalora_group_size": 4}, {"kasa_config": {}}]
)
def test_other_variants_act_from_there_on_as_well(options):
    model, inputs = adapted(**options), ids()
    with torch.no_grad():
        got = model(input_ids=inputs).logits
        with model.disable_adapter():
            base = model(input_ids=inputs).logits
        always = adapted(**options, alora_invocation_tokens=None)
        assert_close(got[2], base[2], rtol=0, atol=0)
        assert torch.equal(got[0, :5], base[0, :5])
        first = inputs[:1, 5:]
        assert_close(model(input_ids=first).logits, always(input_ids=first).logits)


def test_checkpointing_and_training():
    def gradients(checkpointed: bool):
        model = adapted()
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(input_ids=ids(), labels=ids()).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for one, other in zip(gradients(False), gradients(True)):
        assert one.abs().max() > 0
        assert_close(one, other, rtol=1e-5, atol=1e-6)
    model = adapted().train()
    model(input_ids=ids()[2:], labels=ids()[2:]).loss.backward()
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad), "nothing was invoked"


def test_a_head_that_sees_the_last_tokens_only():
    model, inputs = adapted(target_modules=["lm_head"]), ids()
    with torch.no_grad():
        assert_close(model(input_ids=inputs, logits_to_keep=3).logits, model(input_ids=inputs).logits[:, -3:])


def test_an_embedding_is_adapted_from_there_on():
    model, inputs = adapted(target_modules=["embed_tokens"]), ids()
    table, lora = model.get_input_embeddings(), model.get_input_embeddings().adapters["default"]
    seen = []
    table.register_forward_hook(lambda module, args, output: seen.append(output))
    model(input_ids=inputs)
    plain = table.base_layer.weight[inputs]
    update = (lora.scaling * lora.lora_B.weight @ lora.lora_A.weight).T[inputs]
    assert torch.equal(seen[0][0, :5], plain[0, :5])
    assert_close(seen[0][0, 5:], (plain + update)[0, 5:])


def test_virtual_tokens_of_a_prompt_beside_it_come_before():
    model, inputs = adapted(), ids()
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model.add_adapter("prompt", prompt)
    model.set_adapter(["prompt", "default"])
    with torch.no_grad():
        got = model(input_ids=inputs).logits
        model.set_adapter("prompt")
        alone = model(input_ids=inputs).logits
    assert torch.equal(got[0, :5], alone[0, :5]) and not torch.allclose(got[0, 5:], alone[0, 5:], atol=1e-3)
    assert torch.equal(got[2], alone[2])


def test_it_cannot_be_merged_and_says_why():
    model = adapted()
    with pytest.raises(MergeError, match="behind its invocation tokens only"):
        model.merge_adapter()
    with pytest.raises(MergeError, match="behind its invocation tokens only"):
        model.get_base_model().model.layers[0].self_attn.q_proj.weight + 0


def test_files_copies_and_hooks(tmp_path):
    model, inputs = adapted(), ids()
    with torch.no_grad():
        expected = model(input_ids=inputs).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny("llama"), tmp_path)
        assert again.peft_config["default"].alora_invocation_tokens == CALL
        for twin in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(input_ids=inputs).logits, expected)
    base = model.get_base_model()
    assert len(readers(base).values) == 1
    model.delete_adapter("default")
    assert readers(base) is None and not base._forward_pre_hooks


def test_without_a_peft_model_around_it():
    torch.manual_seed(0)
    base = tiny("llama")
    config = LoraConfig(r=2, target_modules=TARGETS, alora_invocation_tokens=CALL)
    inject_adapter_in_model(config, base)
    move(base, 0.3)
    inputs = ids()
    with torch.no_grad():
        got = base(input_ids=inputs).logits
        with call_values(base, alora_offsets=[9 - start for start in START.values()]):
            assert torch.equal(base(input_ids=inputs).logits, got)


def test_what_makes_no_sense_is_refused():
    for tokens in ([], [-1]):
        with pytest.raises(ConfigError, match="alora_invocation_tokens"):
            LoraConfig(alora_invocation_tokens=tokens)
    with pytest.raises(ConfigError, match=r"alora_invocation_tokens.*SEQ_2_SEQ_LM"):
        LoraConfig(alora_invocation_tokens=CALL, task_type="SEQ_2_SEQ_LM")
    with pytest.raises(ConfigError, match="alora_invocation_tokens is for embedding, linear layers"):
        config = LoraConfig(alora_invocation_tokens=CALL, target_modules=["layer"], r=2)
        get_peft_model(nn.ModuleDict({"layer": nn.Conv1d(4, 4, 2)}), config)
