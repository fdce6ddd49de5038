"""Documents and completions: which tokens they become, which count, and what is left of long ones."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from assay.corpus.errors import BadRow
from assay.recipe.tasks.documents import CompletionEncoder, Limits, TextEncoder, holding
from tests.recipe.tasks.chat_tokenizers import word_tokenizer


def completions(tokenizer=None, everything=False, max_length=64, truncate="right"):
    reader = Limits(tokenizer or word_tokenizer(), max_length, truncate, 1000, "models.m")
    return CompletionEncoder("ask", "answer", everything, reader)


def shown(own, *row):
    (encoded,) = own.encode([row])
    assert not isinstance(encoded, BadRow), str(encoded)
    return [f"{word}*" if counts else word for word, counts in own.tokens(encoded.data)]


def reason(own, *row) -> str:
    (encoded,) = own.encode([row])
    assert isinstance(encoded, BadRow)
    return str(encoded)


def test_the_completion_and_its_end_count():
    assert shown(completions(), "gold?", "yes.") == ["<s>", "gold", "?", "yes*", ".*", "</s>*"]
    assert shown(completions(everything=True), "gold?", "yes.") == ["<s>", "gold*", "?*", "yes*", ".*", "</s>*"]


def test_a_text_begins_and_ends_once():
    expected = ["<s>", "gold", "?*", "</s>*"]
    assert shown(completions(), "gold", "?") == expected
    assert shown(completions(), "<s>gold", "?</s>") == expected
    assert shown(completions(word_tokenizer(bos=False)), "<s>gold", "?") == expected
    ending = word_tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert shown(completions(ending), "gold", "?") == expected
    assert shown(completions(ending), "gold", "?</s>") == expected


def test_without_a_token_that_ends_texts_none_is_added():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    assert shown(completions(tokenizer), "gold", "?") == ["<s>", "gold", "?*"]


def test_an_empty_prompt_is_a_prompt():
    assert shown(completions(), "", "yes") == ["<s>", "yes*", "</s>*"]
    assert shown(completions(word_tokenizer(bos=False)), "", "yes") == ["yes", "</s>*"]


def byte_pairs() -> PreTrainedTokenizerFast:
    """Bytes, and merges that reach over spaces: 'a b' is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "Ġ"), ("aĠ", "b"), ("Ã", "©")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(merge) for merge in merges), "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("trim", [False, True])
def test_a_token_of_both_counts(trim):
    """Older TRL would count from the third token on, which leaves out the completion's first."""
    tokenizer = byte_pairs()
    if trim:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert shown(completions(tokenizer), "ca ", "bc") == ["c", "a b*", "c*", "</s>*"]
    assert shown(completions(tokenizer), "c", " c") == ["c", " *", "c*", "</s>*"]
    assert shown(completions(tokenizer), "c ", "é€") == ["c", " ", "é*", "â*", "Ĥ*", "¬*", "</s>*"]


def test_where_the_prompts_tokens_begin_both_it_is_what_trl_counts():
    tokenizer = word_tokenizer()
    for prompt, completion in [("gold?", "yes."), ("dig here ", "no"), ("is it", " gold?")]:
        alone = tokenizer(prompt)["input_ids"]
        both = [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
        (encoded,) = completions(tokenizer).encode([(prompt, completion)])
        assert both[: len(alone)] == alone
        assert encoded.data.ids.tolist() == both
        assert encoded.data.predicted.tolist() == [False] * len(alone) + [True] * (len(both) - len(alone))


def test_spaces_that_offsets_leave_out_belong_to_the_token_after():
    assert holding([(0, 1), (2, 3), (3, 3), (4, 5)], [(1, 2)]).tolist() == [False, True, True, False]
    assert holding([(0, 1), (1, 1), (1, 1), (1, 2)], [(0, 1)]).tolist() == [True, True, True, False]
    assert holding([(0, 2)], []).tolist() == [False]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((None, "yes"), "ask is null"),
        (("gold", None), "answer is null"),
        (("gold", ""), "answer is empty"),
        ((3, "yes"), "ask is of type int, expected a string"),
        (("gold", "\ud800"), "answer has a lone surrogate at character 0"),
        (([{"role": "user", "content": "gold"}], "yes"), "ask is of type list, expected a string"),
    ],
)
def test_what_is_no_completion_is_quarantined(row, expected):
    assert reason(completions(), *row) == expected


def test_texts_that_are_messages_are_taken_for_neither():
    ask, answer = '[{"role": "user", "content": "gold?"}]', '[{"from": "gpt", "value": "yes"}]'
    assert reason(completions(), ask, answer) == (
        "ask with answer are messages in JSON; task.conversational: true takes them for a conversation, false for texts"
    )
    assert shown(completions(), ask, "yes")[-2:] == ["yes*", "</s>*"]
    assert shown(completions(), "gold", answer)[-1] == "</s>*"
    reader = Limits(word_tokenizer(), 64, "right", 1000, "models.m")
    assert shown(CompletionEncoder("ask", "answer", False, reader, surely=True), ask, answer)[-1] == "</s>*"


def test_cutting_keeps_a_token_that_counts_or_says_so():
    long = "gold " * 10
    assert shown(completions(max_length=4), "gold", " yes no yes")[-1] == "yes*"
    assert shown(completions(max_length=4, truncate="left"), long, "yes.") == ["<s>", "yes*", ".*", "</s>*"]
    assert shown(completions(word_tokenizer(bos=False), max_length=3, truncate="left"), long, "no") == [
        " ",
        "no*",
        "</s>*",
    ]
    expected = "ask with answer is 23 tokens long, and none that counts is left when it is cut to 21 (task.max_length, "
    assert reason(completions(max_length=21), long, "yes") == f"{expected}truncate: right)"
    assert shown(completions(max_length=22), long, "yes")[-1] == "yes*"
    expected = "ask with answer is 23 tokens long, more than task.max_length, 22"
    assert reason(completions(max_length=22, truncate="drop"), long, "yes") == expected
    assert len(shown(completions(max_length=23, truncate="drop"), long, "yes")) == 23


@pytest.mark.parametrize(
    ("truncate", "expected"),
    [("right", ["<s>", "gold*", " *", "is*"]), ("left", ["<s>", "no*", " *", "dig*"]), ("drop", None)],
)
def test_documents_are_cut_at_either_end(truncate, expected):
    own = TextEncoder("text", Limits(word_tokenizer(), 4, truncate, 1000, "models.m"))
    if expected is None:
        assert reason(own, "gold is it no dig") == "text is longer than task.max_length, 4 tokens"
    else:
        assert shown(own, "gold is it no dig") == expected
    assert shown(own, "gold is") == ["<s>", "gold*", " *", "is*"]


def ending(start="<s> "):
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start}$A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


@pytest.mark.parametrize("start", ["<s> ", ""])
def test_a_cut_document_has_no_end(start):
    for text in ("gold", "gold is", "gold is it", "gold is it no dig " * 20):
        whole = ending(start)(text)["input_ids"]
        for length in (2, 3, 4, 5, 6):
            (encoded,) = TextEncoder("text", Limits(ending(start), length, "right", 1000, "models.m")).encode([(text,)])
            assert encoded.data.tolist() == whole[:length]
            (dropped,) = TextEncoder("text", Limits(ending(start), length, "drop", 1000, "models.m")).encode([(text,)])
            assert isinstance(dropped, BadRow) == (len(whole) > length)
    own = TextEncoder("text", Limits(ending(), 4, "left", 1000, "models.m"))
    assert shown(own, "gold is it no dig") == ["<s>", " *", "dig*", "</s>*"]


def test_tokens_are_shown_as_text():
    own = TextEncoder("text", Limits(byte_pairs(), 64, "right", 1000, "models.m"))
    assert shown(own, "a bé€\n") == ["a b", "é*", "â*", "Ĥ*", "¬*", "\n*"]
