"""What a column may be for: its form by its type, its part by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from assay.corpus.facts import MIXED
from assay.corpus.format import ColumnFacts

# Names that people give, the likeliest first.
PATHS = ("path", "file_name", "filename", "file", "filepath", "image_path", "url", "source_url", "__url__")
IDS = ("id", "_id", "uuid", "guid", "sample_id", "doc_id", "example_id", "__key__", "key", *PATHS)
TEXTS = (
    *("text", "content", "document", "sentence", "body", "review", "code", "article", "story", "passage", "abstract"),
    *("comment", "tweet", "message", "title", "description"),
)
MESSAGES = ("messages", "conversation", "conversations", "chat", "dialogue", "dialog", "turns")
PAIRS = (
    *(("prompt", "completion"), ("prompt", "response"), ("prompt", "answer"), ("prompt", "chosen")),
    *(("instruction", "output"), ("instruction", "response"), ("instruction", "completion")),
    *(("question", "answer"), ("question", "response"), ("query", "answer"), ("query", "response")),
    *(("problem", "solution"), ("input", "output"), ("source", "target"), ("docstring", "code")),
)
TEXT_PAIRS = (
    *(("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("question", "sentence")),
    *(("text1", "text2"), ("text", "text_pair"), ("query", "passage"), ("query", "document")),
)
LABELS = (
    *("label", "labels", "class", "category", "coarse_label", "fine_label", "intent", "topic", "sentiment", "emotion"),
    *("target", "y", "cls", "label_text"),
)
NUMBERS = ("target", "score", "label", "rating", "value", "y", "labels", "price", "similarity", "stars")
TOKENS = ("tokens", "words")
TAGS = ("ner_tags", "tags", "pos_tags", "chunk_tags", "labels", "ner", "upos", "label")
INPUTS = ("input", "inputs", "features", "x", "vector", "pixels", "embedding", "embeddings", "pixel_values")
IMAGES = ("image", "img", "picture", "photo", "pixel_values", "png", "jpg", "jpeg", "webp")
CAPTIONS = ("caption", "captions", "text", "description", "alt_text", "sentence", "title", "txt", "name")

_WHOLE = re.compile(r"u?int\d+")
_FLOAT = re.compile(r"float|double|halffloat|float\d+|decimal\d*.*")
_NESTED_NUMBERS = re.compile(r"(list<)+(u?int\d+|float|double|halffloat|bool)>+")
# Messages, and those of ShareGPT's form.
_TURNS = re.compile(r"list<struct<(.*\brole: string\b|(?=.*\bfrom: string\b).*\bvalue: (string|list<)).*>>")
_IMAGE_STRUCT = re.compile(r"struct<(bytes: binary, path: (string|null)|path: (string|null), bytes: binary)>")


def form(name: str, facts: ColumnFacts) -> str:
    """text, path, messages, words, tags, numbers, image, class, whole, float, bool, or other."""
    kind = facts.type
    if kind == "image" or _IMAGE_STRUCT.fullmatch(kind) or (kind == "binary" and name.lower() in IMAGES):
        return "image"
    if _TURNS.fullmatch(kind) or (kind == MIXED and name.lower() in MESSAGES):
        return "messages"
    if facts.classes is not None and not kind.startswith("list<"):
        return "class"
    if kind == "list<string>":
        return "words"
    if facts.classes is not None or (kind.startswith("list<") and name.lower() in TAGS and "float" not in kind):
        return "tags"
    if _NESTED_NUMBERS.fullmatch(kind):
        return "numbers"
    if kind in ("string", "bool"):
        return kind if kind == "bool" else "path" if name.lower() in PATHS else "text"
    return "whole" if _WHOLE.fullmatch(kind) else "float" if _FLOAT.fullmatch(kind) else "other"


def _is_inside(name: str, facts: Mapping[str, ColumnFacts]) -> bool:
    """Whether it is a field of a struct. Those of a WebDataset's `.json` member are as good as columns."""
    outer = name.removeprefix("json.") if "json" in facts else name
    return "." in outer and any(name.startswith(f"{other}.") for other in facts if other not in (name, "json"))


class Columns:
    """A shard's top-level columns by what they may be for; each is asked for once at most."""

    def __init__(self, facts: Mapping[str, ColumnFacts]) -> None:
        self.facts = facts
        self.forms = {name: form(name, facts[name]) for name in facts if not _is_inside(name, facts)}
        self.id = self.named(("text", "path", "whole", "other"), IDS)

    def of(self, *forms: str) -> list[str]:
        """The columns of these forms, the id aside."""
        return [name for name, its in self.forms.items() if its in forms and name != getattr(self, "id", None)]

    def named(self, forms: Iterable[str], names: Sequence[str]) -> str | None:
        """Of these forms the first that bears one of the names, whatever its case."""
        by_name = {name.lower().removeprefix("json."): name for name in reversed(self.of(*forms))}
        return next((by_name[name] for name in names if name in by_name), None)

    def likely(self, forms: Iterable[str], names: Sequence[str], taken: Iterable[str | None] = ()) -> str | None:
        """The same, else the only one of these forms that is not taken."""
        named = self.named(forms, [name for name in names if name not in taken])
        left = [name for name in self.of(*forms) if name not in taken]
        return named or (left[0] if len(left) == 1 else None)

    def described(self, most: int = 12) -> str:
        """Every column with its type, in a few words."""
        shown = [f"{name} ({self.facts[name].type[:60]})" for name in list(self.forms)[:most]]
        return ", ".join(shown) + (f" and {len(self.forms) - most} more" if len(self.forms) > most else "")
