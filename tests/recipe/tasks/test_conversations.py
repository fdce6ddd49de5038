"""Conversations: which tokens they become and which count, against masks made by hand."""

from __future__ import annotations

import json

import pytest

from assay.corpus.errors import BadRow
from assay.recipe.chat_template import ChatTemplate
from assay.recipe.errors import EngineError
from assay.recipe.tasks.conversations import ChatEncoder, PromptChatEncoder
from assay.recipe.tasks.documents import Limits
from tests.recipe.tasks.chat_tokenizers import (
    BARE,
    DEFAULTED,
    FORGETFUL,
    MARKED,
    PLAIN,
    STRICT,
    UNSTABLE,
    word_tokenizer,
)

TWO = [
    {"role": "system", "content": "dig"},
    {"role": "user", "content": "gold?"},
    {"role": "assistant", "content": "yes."},
    {"role": "user", "content": "here?"},
    {"role": "assistant", "content": "no"},
]
# A token per line: * where it counts.
TWO_BY_HAND = """\
<s>
<system>
dig
<end>
\\n
<user>
gold
?
<end>
\\n
<assistant>
yes *
. *
<end> *
\\n
<user>
here
?
<end>
\\n
<assistant>
no *
<end> *
\\n"""


def by_hand(text: str) -> list[tuple[str, bool]]:
    lines = [line.split(" ") for line in text.splitlines()]
    return [(word.replace("\\n", "\n"), bool(star)) for word, *star in lines]


def encoder(template, loss_on="assistant", *, tools=None, max_length=64, truncate="right", **options):
    tokenizer = word_tokenizer(template, **options)
    reader = Limits(tokenizer, max_length, truncate, 1000, "models.m")
    return ChatEncoder("chat", tools, loss_on, ChatTemplate("models.m", tokenizer, tools is not None), reader)


def shown(own, *row):
    (encoded,) = own.encode([row])
    assert not isinstance(encoded, BadRow), str(encoded)
    return own.tokens(encoded.data)


def reason(own, *row) -> str:
    (encoded,) = own.encode([row])
    assert isinstance(encoded, BadRow)
    return str(encoded)


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize("value", [TWO, json.dumps(TWO)], ids=["list", "json"])
def test_the_assistants_tokens_count(template, value):
    assert shown(encoder(template), value) == by_hand(TWO_BY_HAND)


@pytest.mark.parametrize("template", [PLAIN, MARKED, FORGETFUL], ids=["plain", "marked", "forgetful"])
def test_of_a_completion_the_last_turn_counts(template):
    tokens = shown(encoder(template, "completion"), TWO)
    counted = [word for word, counts in tokens if counts]
    assert counted == (["it", " ", "no", "<end>"] if template == FORGETFUL else ["no", "<end>"])
    assert [word for word, _ in tokens if word in ("yes", "no")] == ["yes", "no"]


def test_everything_counts_but_the_first_token():
    tokens = shown(encoder(PLAIN, "all"), TWO)
    assert [counts for _, counts in tokens] == [False] + [True] * (len(tokens) - 1)


def test_without_a_prompt_for_it_a_turn_is_what_it_adds():
    expected = ["<s>", "<user>", "gold", "?", "yes*", ".*", "</s>*", "<s>", "<user>", "here", "?", "no*", "</s>*"]
    assert [f"{word}*" if counts else word for word, counts in shown(encoder(BARE), TWO[1:])] == expected


def test_marks_are_what_transformers_makes_of_them():
    tokenizer = word_tokenizer(MARKED)
    theirs = tokenizer.apply_chat_template(TWO, return_dict=True, return_assistant_tokens_mask=True)
    (encoded,) = encoder(MARKED).encode([(TWO,)])
    assert encoded.data.ids.tolist() == theirs["input_ids"]
    assert encoded.data.predicted.tolist() == [bool(mark) for mark in theirs["assistant_masks"]]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("template", [PLAIN, MARKED, PLAIN.removeprefix("{{ bos_token }}")])
def test_the_template_alone_begins_a_text(template, bos):
    words = [word for word, _ in shown(encoder(template, bos=bos), TWO)]
    assert words.count("<s>") == template.startswith("{{ bos_token }}")


def test_a_template_that_is_not_prefix_stable_is_refused():
    with pytest.raises(EngineError, match=r"^models\.m: its chat template is not prefix-stable: ") as caught:
        encoder(UNSTABLE)._template.check_assistant(last=False)
    assert "\n" not in str(caught.value)
    with pytest.raises(EngineError, match="not prefix-stable"):
        encoder(UNSTABLE)._template.check_assistant(last=True)


def test_a_template_that_changes_earlier_turns_takes_conversations_of_one():
    own = encoder(FORGETFUL)
    assert "turn 2 is not what it adds" in own._template.check_assistant(last=False)
    assert own._template.check_assistant(last=True) is None
    assert [word for word, counts in shown(own, TWO[1:3]) if counts] == ["it", " ", "yes", ".", "<end>"]
    assert "loss_on: completion takes the last turn alone" in reason(own, TWO)


@pytest.mark.parametrize("template", [PLAIN, MARKED, STRICT])
def test_good_templates_pass_the_check(template):
    assert encoder(template)._template.check_assistant(last=False) is None


def test_marks_around_other_tokens_are_refused():
    wrong = MARKED.replace("<assistant>{% generation %}", "{% generation %}<assistant>{% endgeneration %}", 1)
    wrong = wrong.replace("<end>{% endgeneration %}", "<end>", 1)
    with pytest.raises(EngineError, match="are not the answer's tokens"):
        encoder(wrong)._template.check_assistant(last=False)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "its tokenizer has no chat template, without which task.messages_column means nothing"),
        ("{% for %}", r"its chat template cannot be used: the chat template refuses it \(TemplateSyntaxError"),
        ("{{ raise_exception('no') }}", r"cannot be used: the chat template refuses it \(TemplateError: no\)"),
        ("hello", "a question and an answer do not come out of it again"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{% for i in range(10000000) %}x{% endfor %}", "OverflowError"),
        ("{{ 'x' * 100000000000 }}", "MemoryError"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(template, message):
    with pytest.raises(EngineError, match=f"^models.m: .*{message}") as caught:
        encoder(template)
    assert "\n" not in str(caught.value)


def test_tools_need_a_template_that_speaks_of_them():
    with pytest.raises(EngineError, match=r"task\.tools_column: the chat template of models\.m makes nothing of tools"):
        encoder(PLAIN, tools="tools")
    own = encoder("{% for t in tools or [] %}{{ t.name }} {% endfor %}" + PLAIN, tools="tools")
    tools = [{"name": "dig", "unused": None}]
    for value in (tools, json.dumps(tools)):
        assert [word for word, _ in shown(own, TWO[1:3], value)][:3] == ["dig", " ", "<s>"]
    assert shown(own, TWO[1:3], None)[0] == ("<s>", False)
    assert reason(own, TWO, "{") == "tools is a text that is no JSON (JSONDecodeError)"
    assert "expected a list of tools" in reason(own, TWO, ["dig"])


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "dig", "arguments": None}}]}


def test_tool_calls_are_the_templates_or_no_sample():
    assert reason(encoder(PLAIN), [TWO[1], CALL]) == "chat[1] has tool calls, which the chat template makes nothing of"
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    own = encoder(PLAIN.replace("{{ m.content }}", "{{ m.content or '' }}" + calls))
    assert [word for word, counts in shown(own, [TWO[1], CALL]) if counts] == ["dig", "<end>"]


def test_nulls_of_the_data_remain():
    template = PLAIN.replace(
        "{{ m.content }}", "{{ 'no' if m.content is none else m.content }}{{ m.tool_calls|default('')|tojson }}"
    )
    call = {"name": "dig", "arguments": {"here": None}}
    messages = [{**TWO[1], "tool_calls": None}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    own = encoder("{{ tools|tojson if tools else '' }}" + template, "all", tools="tools")
    tools = [{"name": "dig", "default": None}]
    text = own._render(json.dumps(messages), json.dumps(tools)).text
    assert text.startswith('[{"name": "dig", "default": null}]<s>')
    assert '<assistant>no[{"name": "dig", "arguments": {"here": null}}]<end>' in text
    text = own._render(messages, tools).text  # a table has the keys of all rows in each
    assert text.startswith('[{"name": "dig"}]<s>')
    assert '<assistant>no[{"name": "dig", "arguments": {}}]<end>' in text


def nested(depth, inner=0):
    value = inner
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("depth", [101, 500, 900])
def test_what_is_nested_deeply_is_quarantined(depth):
    own = encoder("{% for t in tools or [] %}{{ t.name }}{% endfor %}" + PLAIN, tools="tools")
    deep = {"a": nested(depth)}
    for value in ([{**TWO[1], **deep}], json.dumps([{**TWO[1], **deep}])):
        assert reason(own, value, None).startswith("chat is nested too deeply, more than 100 lists")
    assert reason(own, TWO, [deep]).startswith("tools is nested too deeply")
    assert shown(own, [{**TWO[1], "a": nested(98)}, TWO[2]], None)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "chat is null"),
        ("gold", "chat is a text that is no JSON (JSONDecodeError)"),
        ("[" * 100_000, "chat is a text that is no JSON (RecursionError)"),
        ('{"role": "user"}', "chat is of type dict, expected a list of messages"),
        ([], "chat is empty"),
        ("[]", "chat is empty"),
        (["gold"], "chat[0] is of type str, expected a message with role and content"),
        ([{"speaker": "a", "says": "dig"}], "chat[0] has no role (it has says, speaker); expected role and content"),
        ([TWO[0], {"content": "dig"}], "chat[1] has no role (it has content); expected role and content"),
        ([{"role": "user", "content": None}], "chat[0] has no content"),
        ([{"role": "user", "content": 7}], "chat[0].content is of type int, expected a text"),
        ([{**TWO[1], "tool_calls": "dig"}], "chat[0].tool_calls is of type str, expected a list of mappings"),
        (TWO[:2], "chat: has no turn of the assistant"),
        (TWO[2:3], "chat: begins with a turn of the assistant, which the chat template marks no tokens of"),
        ([*TWO[1:3], {"role": "user", "content": "\ud800"}], "chat has a lone surrogate at character"),
    ],
)
def test_what_is_no_conversation_is_quarantined(value, expected):
    assert reason(encoder(PLAIN), value).startswith(expected)


def test_a_template_that_raises_is_the_rows_reason():
    own = encoder(STRICT)
    assert reason(own, TWO) == "chat: the chat template refuses it (TemplateError: turns must alternate)"
    good, bad = own.encode([(TWO[1:3],), (TWO,)])
    assert good.length == 11
    assert isinstance(bad, BadRow)


def test_a_turn_that_the_template_leaves_out_is_no_sample():
    only_known = PLAIN.replace("messages %}", "messages if m.role in ('user', 'assistant') %}")
    own = encoder(only_known, "all")
    assert reason(own, [*TWO[1:3], {"role": "gpt", "content": "dig"}]) == (
        "chat[2]: the chat template leaves out what 'gpt' says"
    )
    for role in ("developer", "tool", "function", "ipython"):
        assert reason(own, [*TWO[1:3], {"role": role, "content": "dig"}]) == (
            f"chat[2]: the chat template leaves out what '{role}' says"
        )
    assert len(reason(own, [*TWO[1:3], {"role": "g" * 10_000, "content": "dig"}])) < 200
    named = encoder("{% if 'tool' == messages[0].role %}{% endif %}" + only_known, "all")
    assert len(shown(named, [*TWO[1:3], {"role": "tool", "content": "dig"}])) == len(shown(own, TWO[1:3]))
    assert reason(named, [*TWO[1:3], {"role": "function", "content": "dig"}]).endswith("what 'function' says")


def test_reasons_are_bounded():
    own = encoder(PLAIN, "completion")
    assert len(reason(own, [{"k" * 10_000: 1, "two\nlines": 2}])) < 300
    assert "\n" not in reason(own, [{"k" * 10_000: 1, "two\nlines": 2}])
    assert len(reason(own, [{"role": "r" * 10_000, "content": "dig"}])) < 300


def test_a_completion_ends_with_the_assistant():
    expected = "chat: ends with a turn of 'user', expected one of 'assistant'"
    assert reason(encoder(PLAIN, "completion"), TWO[:4]) == expected


def test_cutting_keeps_a_token_that_counts_or_says_so():
    words = [word for word, _ in by_hand(TWO_BY_HAND)]
    left = shown(encoder(PLAIN, truncate="left", max_length=5), TWO)
    assert left == [("<s>", False), ("<assistant>", False), ("no", True), ("<end>", True), ("\n", False)]
    right = shown(encoder(PLAIN, max_length=12), TWO)
    assert right == by_hand(TWO_BY_HAND)[:12]
    assert reason(encoder(PLAIN, max_length=11), TWO) == (
        f"chat is {len(words)} tokens long, and none that counts is left when it is cut to 11 (task.max_length, "
        "truncate: right)"
    )
    assert reason(encoder(PLAIN, max_length=23, truncate="drop"), TWO) == (
        f"chat is {len(words)} tokens long, more than task.max_length, 23"
    )
    assert len(shown(encoder(PLAIN, max_length=24, truncate="drop"), TWO)) == len(words) == 24


def test_scores_do_not_follow_the_clock():
    dated = "{{ strftime_now('%d %b %Y') }}" + PLAIN
    own = encoder(dated)
    assert own._template.render(TWO[1:3]).text.startswith("26 Jul 2024<s>")
    assert not word_tokenizer(dated).apply_chat_template(TWO, tokenize=False).startswith("26 Jul 2024")


def test_labels_are_the_counted_tokens_and_padding_is_none():
    own = encoder(PLAIN)
    data = [sample.data for sample in own.encode([(TWO,), (TWO[1:3],)])]
    batch = own.collate(data)
    for i, sample in enumerate(data):
        expected = [id_ if counts else -100 for id_, counts in zip(sample.ids, sample.predicted, strict=True)]
        assert batch["labels"][i].tolist() == expected + [-100] * (len(data[0].ids) - len(expected))
        assert batch["attention_mask"][i].sum() == len(sample.ids)


def test_the_template_is_part_of_the_identity():
    assert encoder(PLAIN).identity != encoder(MARKED).identity
    assert encoder(PLAIN).identity == encoder(PLAIN).identity


ASK, ANSWER = TWO[1:2], TWO[2:3]
AGENT = [TWO[2], {"role": "user", "content": "here?"}, {"role": "assistant", "content": "no"}]


def pairs(template, loss_on="completion", *, tools=None, max_length=64, truncate="right"):
    tokenizer = word_tokenizer(template)
    reader = Limits(tokenizer, max_length, truncate, 1000, "models.m")
    made = ChatTemplate("models.m", tokenizer, tools is not None)
    return PromptChatEncoder("ask", "answer", tools, loss_on, made, reader)


CHATML = "<user> gold ? <end> \\n <assistant> yes* .* <end>* \\n*"
PAIR_BY_HAND = {
    PLAIN: f"<s> {CHATML}",
    MARKED: f"<s> {CHATML}",
    BARE: "<s> <user> gold ? yes* .* </s>*",
    FORGETFUL: "<user> gold ? <end> <assistant> it* _* yes* .* <end>*",
    DEFAULTED: f"<system> dig _ here <end> \\n {CHATML}",
}


@pytest.mark.parametrize("template", PAIR_BY_HAND, ids=["plain", "marked", "bare", "forgetful", "defaulted"])
@pytest.mark.parametrize("form", [list, json.dumps], ids=["list", "json"])
def test_of_prompt_and_completion_all_that_the_completion_adds_counts(template, form):
    own = pairs(template)
    assert own._template.check_added() is None
    words = [word.replace("\\n", "\n").replace("_", " ") for word in PAIR_BY_HAND[template].split(" ")]
    expected = [(word.removesuffix("*"), word.endswith("*")) for word in words]
    assert shown(own, form(ASK), form(ANSWER)) == expected


@pytest.mark.parametrize("template", [PLAIN, MARKED, BARE, DEFAULTED], ids=["plain", "marked", "bare", "defaulted"])
@pytest.mark.parametrize("completion", [ANSWER, AGENT], ids=["one", "several"])
@pytest.mark.parametrize("prompt", [ASK, TWO[:2], TWO[1:4]], ids=["ask", "system", "turns"])
def test_masks_of_prompts_and_completions_are_trls(template, completion, prompt):
    """As its SFTTrainer makes a conversational prompt with a completion into tokens and masks."""
    if template == BARE:
        prompt = prompt[-1:]  # it knows no system
    tokenizer = word_tokenizer(template)
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(
        [*prompt, *completion], return_dict=True, return_assistant_tokens_mask=template == MARKED
    )
    ids = whole["input_ids"]
    assert ids[: len(before)] == before
    added = [False] * len(before) + [True] * (len(ids) - len(before))
    (encoded,) = pairs(template).encode([(prompt, completion)])
    assert encoded.data.ids.tolist() == ids
    assert encoded.data.predicted.tolist() == added
    (everything,) = pairs(template, "all").encode([(prompt, completion)])
    assert everything.data.ids.tolist() == ids
    assert everything.data.predicted.all()
    if template == MARKED:  # assistant_only_loss
        (turns,) = pairs(template, "assistant").encode([(prompt, completion)])
        both = [bool(mark) and own for mark, own in zip(whole["assistant_masks"], added, strict=True)]
        assert turns.data.predicted.tolist() == both


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_of_a_completion_the_assistants_turns_may_count(template):
    tokens = shown(pairs(template, "assistant"), TWO[:4], [TWO[4], *AGENT[1:]])
    assert [word for word, counts in tokens if counts] == ["no", "<end>", "no", "<end>"]
    assert ("yes", False) in tokens


def test_what_a_marked_template_adds_at_the_end_of_all_is_no_turns():
    """As Phi-3's does, with the token that ends a text."""
    ends = MARKED + "{% if not add_generation_prompt %}</s>{% endif %}"
    tokens = shown(pairs(ends, "assistant"), ASK, AGENT)
    assert [word for word, counts in tokens if counts] == ["yes", ".", "<end>", "no", "<end>"]
    assert tokens[-1] == ("</s>", False)
    assert shown(pairs(ends), ASK, AGENT)[-1] == ("</s>", True)


def test_a_prompt_that_the_template_changes_is_refused():
    with pytest.raises(EngineError, match=r"^models\.m: its chat template is not prefix-stable: what the "):
        pairs(UNSTABLE)._template.check_added()
    assert "is not how it begins both" in reason(pairs(UNSTABLE), ASK, ANSWER)
    assert shown(pairs(UNSTABLE, "all"), ASK, ANSWER)


def test_prompts_with_tools():
    own = pairs("{% for t in tools or [] %}{{ t.name }}{% endfor %}" + PLAIN, tools="tools")
    tokens = shown(own, ASK, ANSWER, [{"name": "dig"}])
    assert tokens[0] == ("dig", False)
    assert [word for word, counts in tokens if counts] == ["yes", ".", "<end>", "\n"]
    assert shown(own, ASK, ANSWER, None)[0] == ("<s>", False)
    assert reason(own, ASK, ANSWER, "{") == "tools is a text that is no JSON (JSONDecodeError)"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (("gold?", ANSWER), "ask is a text that is no JSON (JSONDecodeError); expected a list of messages"),
        ((ASK, "yes"), "answer is a text that is no JSON (JSONDecodeError); expected a list of messages"),
        (("gold?", "yes"), "ask is a text that is no JSON"),
        ((None, ANSWER), "ask is null"),
        ((ASK, None), "answer is null"),
        (([], ANSWER), "ask is empty"),
        ((ASK, []), "answer is empty"),
        ((ASK, ASK), "answer begins with a turn of 'user', expected one of 'assistant'"),
        ((ASK, [{"role": "assistant", "content": None}]), "answer[0] has no content"),
        ((ASK, [{"from": "gpt", "value": "yes"}]), "ask with answer has messages of role and content and some of from"),
        (([CALL], ANSWER), "ask[0] has tool calls, which the chat template makes nothing of"),
        ((ASK, [*ANSWER, CALL]), "answer[1] has tool calls, which the chat template makes nothing of"),
        ((ASK, [*ANSWER, {"role": "user", "content": [{"type": "image"}]}]), "answer[1].content[0] is of type 'image'"),
    ],
)
def test_what_are_no_prompt_and_completion_of_messages_is_quarantined(row, expected):
    assert reason(pairs(PLAIN), *row).startswith(expected)


def test_long_prompts_are_cut_as_texts_are():
    assert shown(pairs(PLAIN, max_length=8), ASK, ANSWER)[-1] == ("yes", True)
    expected = "ask with answer is 11 tokens long, and none that counts is left when it is cut to 7 (task.max_length, "
    assert reason(pairs(PLAIN, max_length=7), ASK, ANSWER) == f"{expected}truncate: right)"
    left = shown(pairs(PLAIN, max_length=4, truncate="left"), ASK, ANSWER)
    assert left == [("<s>", False), (".", True), ("<end>", True), ("\n", True)]


def test_sharegpts_prompts_are_the_same_sample():
    plain = shown(pairs(PLAIN), ASK, ANSWER)
    assert shown(pairs(PLAIN), [{"from": "human", "value": "gold?"}], [{"from": "gpt", "value": "yes."}]) == plain
