"""What is learnt of a conversation: the answers and their ends, told apart by marks or by prefixes, or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from deltatune.data.encode import Encoder, encode
from deltatune.data.features import IGNORE
from deltatune.data.formats import detect, examples
from deltatune.data.prepare import prepare
from deltatune.data.read import table_of
from deltatune.data.templates import NAMED, set_template
from deltatune.errors import ConfigError, DataError
from tests.train.toys import WORDS

MARKS = ["<s>", "[user]", "[assistant]", "[system]", "[tool]", "[end]"]
# without generation marks, with a line break behind each turn, and a beginning of its own
PLAIN = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
MARKED = PLAIN.replace(
    "[{{ m['role'] }}] {{ m['content'] }} [end]\n",
    "[{{ m['role'] }}] {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} [end]{% endgeneration %}"
    "{% else %}{{ m['content'] }} [end]{% endif %}\n",
)
# answers that are not the last lose a word, as templates do with thoughts
UNSTABLE = PLAIN.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split(' ')[-1] }}{% else %}"
    "{{ m['content'] }}{% endif %}",
)
ENDLESS = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
TWO = [
    {"role": "system", "content": "old"},
    {"role": "user", "content": "red cat"},
    {"role": "assistant", "content": "blue dog"},
    {"role": "user", "content": "green"},
    {"role": "assistant", "content": "small bird sings"},
]


def tokenizer(template: str | None, end: str = "[end]") -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "</s>", "<unk>", *MARKS, *WORDS, "assistant", "user", "system", ":"]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(names)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=end, eos_token=end, unk_token="<unk>", bos_token="<s>",
        additional_special_tokens=MARKS[1:],
    )  # fmt: skip
    made.chat_template = template
    return made


def features_of(template: str, row: dict[str, Any], end: str = "[end]", **options: Any) -> tuple[Any, Any]:
    words = tokenizer(template, end)
    encoder = replace(Encoder(words, "chat", 64, 16), **options)
    table = table_of([row])
    (example,) = examples(table, detect(table, "chat"))
    return words, encoder(example)[0]


def learnt(template: str, row: dict[str, Any], **options: Any) -> str:
    words, features = features_of(template, row, **options)
    return words.decode([label for label in features.labels if label != IGNORE])


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_answers_are_learnt_with_their_ends_and_nothing_else(template):
    row = {"messages": TWO}
    words, features = features_of(template, row)
    whole = words.decode(features.input_ids)
    assert whole.startswith("<s> [system] old [end] [user] red cat")  # one beginning, the template's
    assert whole.count("<s>") == 1
    assert learnt(template, row) == "blue dog [end] small bird sings [end]"
    assert learnt(template, row, train_on="last") == "small bird sings [end]"
    assert learnt(template, row, train_on="all") == whole.removeprefix("<s> ")
    assert learnt(template, row, answer_only=False) == whole.removeprefix("<s> ")
    assert features.targets == 7


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_turn_of_weight_0_is_not_learnt(template):
    messages = [dict(message) for message in TWO]
    messages[2]["weight"] = 0
    assert learnt(template, {"messages": messages}) == "small bird sings [end]"


def test_a_template_that_rewrites_earlier_turns_is_refused_where_that_matters():
    row = {"messages": TWO}
    with pytest.raises(DataError, match=r"rows line 1: messages\[2\] cannot be told apart, .*train_on: last") as caught:
        features_of(UNSTABLE, row)
    assert caught.value.key == "1"
    assert learnt(UNSTABLE, row, train_on="last") == "small bird sings [end]"
    assert learnt(UNSTABLE, {"messages": TWO[:3]}) == "blue dog [end]"


def test_an_end_is_put_where_the_template_writes_none():
    row = {"messages": TWO[1:3]}
    words, features = features_of(ENDLESS, row, end="</s>")
    assert words.decode(features.input_ids) == "user red cat assistant blue dog </s>"
    assert learnt(ENDLESS, row, end="</s>") == "blue dog </s>"


def test_an_end_behind_the_marks_is_learnt_too():
    outside = MARKED.replace(" [end]{% endgeneration %}", "{% endgeneration %} [end]")
    assert learnt(outside, {"messages": TWO[1:3]}) == "blue dog [end]"


def test_the_end_is_learnt_where_it_is_also_what_rows_are_filled_with():
    from deltatune.data.collate import Collator

    words, features = features_of(PLAIN, {"messages": TWO[1:3]})
    assert words.pad_token_id == words.eos_token_id
    batch = Collator(words.pad_token_id, "chat")([features, replace(features, input_ids=[4], labels=[IGNORE])])
    assert batch["labels"][0].tolist().count(words.eos_token_id) == 1
    assert batch["labels"][1].eq(IGNORE).all()


def test_generation_starts_where_the_last_answer_does():
    words, features = features_of(PLAIN, {"messages": TWO})
    table = table_of([{"messages": TWO}])
    (example,) = examples(table, detect(table, "chat"))
    encoder = Encoder(words, "chat", 64, 16)
    prompt = encoder.prompt(example)
    assert features.input_ids[: len(prompt)] == prompt
    assert words.decode(features.input_ids[len(prompt) :]) == "small bird sings [end]"
    assert words.decode(encoder.prompt("red cat")) == "<s> [user] red cat [end] [assistant]"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TWO[1:3]},
        {"messages": json.dumps(TWO[1:3])},  # as csv and parquet have it
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "red cat"}]}, TWO[2]]},
        {"conversations": [{"from": "human", "value": "red cat"}, {"from": "gpt", "value": "blue dog"}]},
        {"conversations": [*[{"from": "human", "value": "red cat"}, {"from": "gpt", "value": "blue dog"}],
                           {"from": "human", "value": "never answered"}]},
        {"prompt": "red cat", "completion": "blue dog"},
        {"instruction": "red", "input": "cat", "output": "blue dog"},
        {"instruction": "red cat", "input": "", "output": "blue dog"},
        {"question": "red cat", "answer": "blue dog"},
    ],
)  # fmt: skip
def test_every_known_form_is_the_same_conversation(row):
    words, features = features_of(PLAIN, row)
    assert words.decode(features.input_ids) == "<s> [user] red cat [end] [assistant] blue dog [end]"
    assert learnt(PLAIN, row) == "blue dog [end]"


def test_system_and_history_stand_before_a_single_exchange():
    row = {"instruction": "green", "output": "small bird", "system": "old", "history": [["red cat", "blue dog"]]}
    words, features = features_of(PLAIN, row)
    assert words.decode(features.input_ids) == (
        "<s> [system] old [end] [user] red cat [end] [assistant] blue dog [end] [user] green [end] "
        "[assistant] small bird [end]"
    )


def test_tools_and_calls_reach_the_template():
    template = (
        "{% if tools %}{{ tools[0]['function']['name'] }} {% endif %}{% for m in messages %}[{{ m['role'] }}] "
        "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }} {{ m.tool_calls[0].function.arguments['word'] }} "
        "{% else %}{{ m['content'] }} {% endif %}[end] {% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "tree", "arguments": '{"word": "fish"}'}}
    row = {
        "tools": [{"type": "function", "function": {"name": "house"}}],
        "messages": [
            {"role": "user", "content": "red"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "blue"},
            {"role": "assistant", "content": "dog"},
        ],
    }
    words, features = features_of(template, row)
    assert words.decode(features.input_ids) == (
        "house [user] red [end] [assistant] tree fish [end] [tool] blue [end] [assistant] dog [end]"
    )
    assert learnt(template, row) == "tree fish [end] dog [end]"
    named = {"conversations": [{"from": "human", "value": "red"},
                               {"from": "function_call", "value": '{"name": "tree", "arguments": {"word": "fish"}}'},
                               {"from": "observation", "value": "blue"}, {"from": "gpt", "value": "dog"}]}  # fmt: skip
    assert learnt(template, named) == "tree fish [end] dog [end]"


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "field 'messages' is empty"),
        ("red", "field 'messages' is 'red', which is no JSON"),
        ([{"role": "usr", "content": "a"}, TWO[2]], "field 'messages[0].role' is 'usr'; did you mean 'user'?"),
        ([{"role": "user", "contents": "a"}, TWO[2]], "['contents', 'role']; did you mean 'contents'?)"),
        ([{"role": "user", "content": 3}, TWO[2]], "field 'messages[0].content' is 3 of type int"),
        ([TWO[1], {"role": "assistant", "content": " "}], "field 'messages[1].content' is empty"),
        ([TWO[1]], "field 'messages' has no message of the assistant"),
        (["red", TWO[2]], "field 'messages[0]' is 'red' of type str"),
        ([TWO[1], {"role": "assistant", "tool_calls": [{"function": {}}]}], "'messages[1].tool_calls[0]' is"),
        ([TWO[1], {**TWO[2], "weight": 2}], "field 'messages[1].weight' is 2"),
    ],
)  # fmt: skip
def test_a_faulty_conversation_is_told_by_row_message_and_part(messages, told):
    table = table_of([{"messages": TWO}, {"messages": messages}])
    with pytest.raises(DataError) as caught:
        examples(table, detect(table, "chat"))
    assert told in str(caught.value)
    assert "row 2" in str(caught.value)
    assert caught.value.key == "2"


def test_what_the_template_does_not_take_is_told_by_row():
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"rows line 1: messages are not taken by the chat template \(roles must alt"):
        features_of(strict, {"messages": TWO})


def test_a_template_is_only_given_where_it_is_asked_for(tmp_path):
    with pytest.raises(ConfigError, match="has no chat template; choose one with chat_template"):
        set_template(tokenizer(None), None)
    with pytest.raises(ConfigError, match=r"neither a known name .* nor a file; did you mean 'chatml'"):
        set_template(tokenizer(None), "chatlm")
    own = tokenizer(PLAIN)
    set_template(own, None)
    assert own.chat_template == PLAIN
    (tmp_path / "mine.jinja").write_text(MARKED)
    set_template(own, str(tmp_path / "mine.jinja"))
    assert own.chat_template == MARKED


@pytest.mark.parametrize("name", NAMED)
def test_the_named_templates_mark_their_answers_and_end(name):
    pytest.importorskip("transformers")
    words = tokenizer(NAMED[name], "</s>")
    table = table_of([{"messages": TWO}])
    (example,) = examples(table, detect(table, "chat"))
    text = words.apply_chat_template(TWO, tokenize=False)
    assert all(message["content"] in text for message in TWO)
    features, _ = Encoder(words, "chat", 64, 16)(example)
    assert features.labels[-1] == words.eos_token_id
    assert features.labels.count(words.eos_token_id) == (2 if name == "plain" else 1)
    prompt = Encoder(words, "chat", 64, 16).prompt(example)
    assert features.input_ids[: len(prompt)] == prompt


def rows_of(count: int, **options: Any) -> tuple[list[Any], Any]:
    words = tokenizer(PLAIN)
    made = [{"messages": [{"role": "user", "content": "red " * n}, TWO[2]]} for n in range(1, count + 1)]
    corpus = prepare(table_of(made), None, None, "chat")
    found = corpus.encode(words, max_length=10, max_target_length=8, **options)
    return found.train.features, found.train.lengths


def test_rows_whose_answers_are_cut_away_are_left_out_and_counted():
    rows, lengths = rows_of(8)  # 7 tokens and the words of the question
    assert lengths.truncated == 5
    assert lengths.dropped == 3  # whose answers begin beyond the limit
    assert len(rows) == 5
    assert lengths.whole == tuple(range(8, 16))
    assert all(row.targets for row in rows)


def test_truncation_can_keep_the_end_or_leave_rows_out():
    rows, lengths = rows_of(8, truncation="left")
    assert (len(rows), lengths.truncated, lengths.dropped) == (8, 5, 0)
    assert all(row.targets == 3 and row.length <= 10 for row in rows)
    assert all(row.input_ids[0] == 3 for row in rows)  # the beginning stays
    rows, lengths = rows_of(8, truncation="drop")
    assert (len(rows), lengths.truncated, lengths.dropped) == (3, 5, 5)


def test_a_limit_that_leaves_nothing_to_learn_is_refused():
    corpus = prepare(table_of([{"messages": TWO}]), None, None, "chat")
    with pytest.raises(DataError, match="no answer fits into 4 tokens"):
        corpus.encode(tokenizer(PLAIN), max_length=4, max_target_length=8)


def test_pairs_can_be_cut_at_either_end_or_left_out(words):
    pair = prepare(table_of([{"input": "old new red cat", "target": "blue dog"}]), None, None, "causal").train.examples
    usual = Encoder(words, "causal", 6, 6, " :")
    kept = {side: encode(pair, replace(usual, truncation=side), "rows", None)[0] for side in (None, "left", "right")}
    assert {side: words.decode(found[0].input_ids) for side, found in kept.items()} == {
        None: "red cat : blue dog </s>",
        "left": "red cat : blue dog </s>",
        "right": "old new red cat : blue",
    }
    with pytest.raises(DataError, match="no answer fits"):
        encode(pair, replace(usual, truncation="drop"), "rows", None)
