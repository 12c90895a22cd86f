"""`deltatune chat` from a pipe, and the session behind it."""

import pytest
import torch

from tests.cli.conftest import WORDS, tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama whose tokenizer has a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    names = [*WORDS, "user", "assistant", "system", ":"]
    config = LlamaConfig(
        vocab_size=3 + len(names), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=1, pad_token_id=0, bos_token_id=None,
        initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    made = tokenizer(names)
    made.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(llama, tmp_path_factory):
    """Two adapters off their start: LoRA, and a prompt."""
    from transformers import AutoModelForCausalLM

    from deltatune import LoraConfig, PromptTuningConfig, get_peft_model

    folders = []
    for name, config in (
        ("lora", LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)),
        ("prompt", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    ):
        torch.manual_seed(1)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
        folders.append(tmp_path_factory.mktemp("adapters") / name)
        model.save_pretrained(folders[-1])
    return folders


def expected(llama, folder, messages, count=5):
    """What transformers answers to a conversation, by its own template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from deltatune import PeftModel

    words = AutoTokenizer.from_pretrained(llama)
    model = AutoModelForCausalLM.from_pretrained(llama)
    model = (PeftModel.from_pretrained(model, folder) if folder else model).eval()
    text = words.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = words(text, return_tensors="pt", add_special_tokens=False).input_ids
    made = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False)
    return words.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()


def talk(run, *words, lines):
    done = run("chat", *words, "--max-new-tokens", 5, stdin="".join(f"{line}\n" for line in lines))
    assert done.code == 0, done.err
    return [line.strip() for line in done.out.splitlines()], done.err


def test_answers_follow_the_template_and_what_was_said(run, llama, adapters):
    out, _ = talk(run, adapters[0], "--model", llama, lines=["red cat", "blue dog", "/reset", "red cat"])
    first = expected(llama, adapters[0], [{"role": "user", "content": "red cat"}])
    turns = [
        {"role": "user", "content": "red cat"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "blue dog"},
    ]
    assert out == [first, expected(llama, adapters[0], turns), first]
    assert first


def test_adapters_and_base_take_turns_on_one_model(run, llama, adapters):
    lines = ["/adapter prompt", "sun", "/reset", "/base", "sun", "/reset", "/adapter lora", "sun"]
    out, err = talk(run, *adapters, "--model", llama, lines=lines)
    said = [{"role": "user", "content": "sun"}]
    assert out == [expected(llama, folder, said) for folder in (adapters[1], None, adapters[0])]
    assert len(set(out)) > 1
    assert "prompt answers" in err and "base answers" in err


def test_compare_asks_all_and_is_not_remembered(run, llama, adapters):
    out, _ = talk(run, *adapters, "--model", llama, lines=["sea", "/compare", "/compare gold", "/quit", "sun"])
    sea, gold = ([{"role": "user", "content": word}] for word in ("sea", "gold"))
    folders = {"base": None, "lora": adapters[0], "prompt": adapters[1]}
    assert out[0] == expected(llama, adapters[0], sea)
    assert out[1:4] == [f"{name}: {expected(llama, folder, sea)}".strip() for name, folder in folders.items()]
    turns = [*sea, {"role": "assistant", "content": out[0]}, *gold]
    assert out[4:] == [f"{name}: {expected(llama, folder, turns)}".strip() for name, folder in folders.items()]


def test_a_system_message_is_given(run, llama, adapters):
    out, err = talk(run, adapters[0], "--model", llama, lines=["/system gold sea", "red"])
    asked = [{"role": "system", "content": "gold sea"}, {"role": "user", "content": "red"}]
    assert out == [expected(llama, adapters[0], asked)]
    assert "system message set" in err


def test_a_wrong_command_ends_nothing(run, llama, adapters):
    lines = ["/adaptr lora", "/adapter lorra", "/compare", "/help", "sun"]
    out, err = talk(run, adapters[0], "--model", llama, lines=lines)
    assert out == [expected(llama, adapters[0], [{"role": "user", "content": "sun"}])]
    assert "/adapter" in err and "'lora'" in err and "nothing was said" in err


def test_an_encoder_decoder_answers_each_message_as_generate_does(run, lora, prefix):
    out, err = talk(run, lora, prefix, lines=["red cat", "/adapter prefix", "red cat"])
    alone = [run("generate", folder, "red cat", "--max-new-tokens", 5).out.strip() for folder in (lora, prefix)]
    assert out == alone
    assert "on its own" in err


def test_several_adapters_of_generate_answer_as_each_alone(run, lora, prefix):
    import json

    words = ["red cat dog", "sun"]
    done = run("generate", lora, "--adapter", prefix, "--compare", "--json", *words)
    assert done.code == 0, done.err
    rows = [json.loads(line)["outputs"] for line in done.out.splitlines()]
    assert [list(row) for row in rows] == [["base", "lora", "prefix"]] * 2
    for name, folder in (("lora", lora), ("prefix", prefix)):
        assert [row[name] for row in rows] == run("generate", folder, *words).out.splitlines()


def test_writing_stops_when_nobody_reads_on(llama):
    from deltatune.chat import Session
    from deltatune.generate import Decoding, load_several, plan_several

    session = Session(load_several(plan_several([], str(llama))), Decoding(max_new_tokens=50))
    pieces = session.say("sun")
    first = next(pieces)
    pieces.close()
    assert session.turns[0].answer.split()[0] == first.split()[0]
    assert session.turns[0].answer == first.strip()


def test_an_error_of_the_model_reaches_the_reader(llama):
    from contextlib import nullcontext

    from transformers import AutoTokenizer

    from deltatune.chat.stream import stream

    def broken(**inputs):
        raise RuntimeError("no numbers")

    with pytest.raises(RuntimeError, match="no numbers"):
        list(stream(AutoTokenizer.from_pretrained(llama), broken, {}, nullcontext()))


def test_what_cannot_converse_is_refused(refused, classifier, lora):
    assert "deltatune generate" in refused(2, "chat", classifier, stdin="hello\n")
    assert "encoder-decoder" in refused(2, "chat", lora, "--chat-template", "plain", stdin="hello\n")
    assert "no adapter and no model" in refused(2, "chat", stdin="hello\n")
