"""The tasks that a shard's columns allow, the likeliest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from assay.corpus.facts import MIXED
from assay.recipe.draft.columns import (
    CAPTIONS,
    IMAGES,
    INPUTS,
    LABELS,
    MESSAGES,
    NUMBERS,
    PAIRS,
    TAGS,
    TEXT_PAIRS,
    TEXTS,
    TOKENS,
    Columns,
)

# What a model is used for, by the key that names a sample's input.
_CLASSIFIERS = {
    "image_column": "image classification",
    "text_column": "text classification",
    "input_column": "numbers",
}


@dataclass(frozen=True)
class Reading:
    """One way to understand the columns."""

    task: str
    """The recipe's kind of task."""
    use: str
    """What the models must be for: as `ModelFacts.use`."""
    keys: Mapping[str, str]
    """The task's keys that name columns."""
    why: str
    comments: Mapping[str, str] = field(default_factory=dict)
    """What is to be said beside a key."""
    chat: bool = False
    """Whether it needs a chat template."""


def readings(columns: Columns) -> list[Reading]:
    """Every task that the columns allow."""
    found = [_conversations, _pairs_of_messages, _pairs, _two_towers, _token_classes, _classes, _regression, _texts]
    return [reading for look in found for reading in look(columns)]


def _conversations(columns: Columns) -> Iterator[Reading]:
    name = columns.likely(("messages",), MESSAGES)
    why = f"{name} holds turns with role and content"
    kind = "" if name is None else columns.facts[name].type
    if kind == MIXED:
        why = f"{name} is a conversation by its name, in more forms than one"
    elif name is not None and "role: string" not in kind:
        why = f"{name} holds turns with from and value"
    if name is None:
        name = columns.named(("text",), MESSAGES)
        why = f"{name} is a text by a conversation's name, taken for JSON"
    if name is not None:
        comments = {"messages_column": "the assistant's tokens count (loss_on: assistant)"}
        yield Reading("causal_lm", "causal_lm", {"messages_column": name}, why, comments, chat=True)


def _named_pair(columns: Columns, names: Sequence[tuple[str, str]], form: str = "text") -> tuple[str, str] | None:
    """The first two columns of a form, of texts, that bear two of the names."""
    found = {name.lower(): name for name in columns.of(form)}
    return next(((found[one], found[other]) for one, other in names if one in found and other in found), None)


def _pairs_of_messages(columns: Columns) -> Iterator[Reading]:
    pair = _named_pair(columns, PAIRS, "messages")
    if pair is not None:
        comments = {"completion_column": "what it adds to the prompt counts (loss_on: completion)"}
        keys = dict(zip(("prompt_column", "completion_column"), pair, strict=True))
        why = f"{pair[0]} and {pair[1]} hold messages"
        yield Reading("causal_lm", "causal_lm", keys, why, comments, chat=True)


def _pairs(columns: Columns) -> Iterator[Reading]:
    pair = _named_pair(columns, PAIRS)
    if pair is None:
        return
    prompt, completion = pair
    rest = [name for name in columns.of("text") if name.lower() in ("input", "context", "system") and name != prompt]
    comments = {"completion_column": "its tokens alone count (loss_on: completion)"}
    if rest:
        comments["prompt_column"] = f"without {' and '.join(rest)}: join them in the data if they belong to it"
    keys = {"prompt_column": prompt, "completion_column": completion}
    yield Reading("causal_lm", "causal_lm", keys, f"{prompt} and {completion} are texts", comments)


def _two_towers(columns: Columns) -> Iterator[Reading]:
    image = columns.likely(("image",), IMAGES)
    labels = [name for name in columns.of("text") if name.lower() in LABELS]
    caption = columns.likely(("text",), CAPTIONS, labels)
    if image and caption:
        why = f"{image} holds images and {caption} texts"
        yield Reading("contrastive", "contrastive", {"image_column": image, "text_column": caption}, why)


def _token_classes(columns: Columns) -> Iterator[Reading]:
    tags = columns.named(("tags", "words"), TAGS) or columns.likely(("tags",), TAGS)
    tokens = columns.likely(("words",), TOKENS, (tags,))
    if tokens and tags:
        why = f"{tokens} holds lists of words and {tags} as many tags"
        keys = {"tokens_column": tokens, "tags_column": tags}
        yield Reading("token_classification", "token_classification", keys, why)


def _inputs(columns: Columns, taken: str) -> Iterator[tuple[dict[str, str], str]]:
    """The keys of what a labelled sample's input may be, and what says so."""
    if image := columns.likely(("image",), IMAGES, (taken,)):
        yield {"image_column": image}, f"{image} holds images"
    if pair := _named_pair(columns, TEXT_PAIRS):
        yield {"text_column": pair[0], "text_pair_column": pair[1]}, f"{pair[0]} and {pair[1]} hold pairs of texts"
    elif text := columns.likely(("text",), TEXTS, (taken,)) or next(iter(_others(columns, taken)), None):
        yield {"text_column": text}, f"{text} holds texts"
    if numbers := columns.likely(("numbers",), INPUTS, (taken,)):
        yield {"input_column": numbers}, f"{numbers} holds lists of numbers"


def _others(columns: Columns, taken: str) -> list[str]:
    return [name for name in columns.of("text") if name != taken]


def _classes(columns: Columns) -> Iterator[Reading]:
    label = columns.likely(("class",), LABELS) or columns.named(("class", "whole", "bool", "text"), LABELS)
    label = label or columns.named(("float",), LABELS[:3])  # as pandas saves whole numbers with gaps
    if label is None and not columns.of("text"):  # beside texts a lone number may count anything
        label = columns.likely(("whole", "bool"), ())
    return _labelled(columns, "classification", "label_column", label, "their classes")


def _regression(columns: Columns) -> Iterator[Reading]:
    target = columns.likely(("float",), NUMBERS) or columns.named(("whole",), NUMBERS)
    return _labelled(columns, "regression", "target_column", target, "their numbers")


def _labelled(columns: Columns, task: str, key: str, label: str | None, what: str) -> Iterator[Reading]:
    """A sample for each input that the columns allow, with its label."""
    if label is None:
        return
    for keys, why in _inputs(columns, label):
        yield Reading(task, _CLASSIFIERS[next(iter(keys))], keys | {key: label}, f"{why} and {label} {what}")


def _texts(columns: Columns) -> Iterator[Reading]:
    names = columns.of("text")
    name = columns.likely(("text",), TEXTS) or next(iter(names), None)
    if name is None:
        return
    others = [other for other in names if other != name]
    why = f"{name} is the only column of texts" if not others else f"{name} holds texts"
    comments = {"text_column": f"there are also {', '.join(others[:3])}"} if others else {}
    yield Reading("causal_lm", "causal_lm", {"text_column": name}, why, comments)
