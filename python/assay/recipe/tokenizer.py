"""Tokenizers: loaded from looked-at files, freed of inherited state, and compared by what they do."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from assay._lazy import require
from assay.recipe.checkpoints import read_config, staged, without
from assay.recipe.errors import EngineError
from assay.recipe.gguf_header import read_gguf
from assay.recipe.library_calls import native_quietly, quietly, refusing
from assay.recipe.model_files import CONFIG, ModelFolder, read_mapping, read_weights, shortened

# All their keys become arguments of the tokenizer's class, those of the second file too.
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
_NAMES_FILES = re.compile(r".*_(file|files|path|dir|spm)|init_inputs")
# Keys whose effect the task decides: sampling, cutting, padding.
_DROPPED = {
    "sp_model_kwargs",
    "truncation_side",
    "padding_side",
    "max_length",
    "truncation",
    "padding",
    "stride",
    "pad_to_multiple_of",
}
_DICTIONARIES = ("small", "core", "full")  # of sudachi; another is the path of one
# Parts of a tokenizer's JSON that do not change which tokens a text becomes.
_IDLE = {"version", "truncation", "padding", "decoder"}


def load_tokenizer(folder: ModelFolder, model: ModelFolder | None) -> Any:
    """A folder's tokenizer, with the ``model``'s config to tell its class; without one, its own settings tell.

    Raises:
        EngineError: a file cannot be read, or there is none.
    """
    if not folder.tokenizer:
        raise EngineError(f"{folder.path}: has no tokenizer; expected tokenizer.json")
    for name in folder.tokenizer:
        if name.endswith(".json"):
            # Some vocabularies are lists; everything else is a mapping.
            _ = name.startswith("vocab") or name in _SETTINGS or read_mapping(folder.full(name))
    written = {} if model is None else {CONFIG: read_config(model, len(read_weights(model)))}
    written |= {name: _read_settings(folder.full(name)) for name in _SETTINGS if name in folder.tokenizer}
    linked = {name: folder.full(name) for name in folder.tokenizer if name not in written}
    with staged(written, linked) as private:
        tokenizer = _load(f"{folder.path}: its tokenizer files", private)
    if _needs_vocabulary(tokenizer) and not (folder.has_vocabulary and _has_words(tokenizer)):
        raise EngineError(
            f"{folder.path}: its tokenizer ({type(tokenizer).__name__}) has no vocabulary; expected tokenizer.json, or "
            "the files that this class keeps its tokens in, such as vocab.txt or tokenizer.model"
        )
    return tokenizer


def _read_settings(path: str) -> dict[str, Any]:
    """A file of settings without those that name files, or that the task decides."""
    given = read_mapping(path)
    values: dict[str, Any] = without(given, _DROPPED)
    for kind in ("mecab_kwargs", "sudachi_kwargs", "jumanpp_kwargs"):
        # These decide which words a text has: dropping one would make other tokens.
        own = values.get(kind) or {}
        named = ["mecab_option", "sudachi_config_path", "sudachi_resource_dir"]
        if not isinstance(own, dict) or any(own.get(key) for key in named):
            raise EngineError(f"{path}: {kind} names files of a dictionary; only those that are installed are read")
        if own.get("sudachi_dict_type", "core") not in _DICTIONARIES:
            raise EngineError(f"{path}: sudachi_dict_type must be one of {', '.join(_DICTIONARIES)}")
    return {
        key: value
        for key, value in values.items()
        if not _NAMES_FILES.fullmatch(key) and not (key in ("vocab", "merges") and isinstance(value, str))
    }


def _needs_vocabulary(tokenizer: Any) -> bool:
    """Not those that cut texts into bytes or code points."""
    return bool(type(tokenizer).vocab_files_names)


def _has_words(tokenizer: Any) -> bool:
    """Whether it knows tokens that are not special ones. transformers' own defaults have one such token at most."""
    return (
        len(tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys() - set(tokenizer.all_special_tokens)) > 1
    )


def load_gguf_tokenizer(path: str) -> Any:
    """The tokenizer in a GGUF file."""
    read_gguf(path)
    require("gguf", "text")
    with staged({}, {"model.gguf": path}) as private:
        return _load(path, private, gguf_file="model.gguf")


def _load(what: str, private: str, **options: Any) -> Any:
    transformers = require("transformers", "text")
    with quietly(), native_quietly(), refusing(f"{what}: transformers cannot load a tokenizer from them"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            private, local_files_only=True, trust_remote_code=False, **options
        )
        # A document is its first tokens, whatever a tokenizer was used for before.
        tokenizer.truncation_side = tokenizer.padding_side = "right"
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
            if getattr(backend.model, "dropout", None):
                backend.model.dropout = None  # it would cut the same text differently each time
        tokenizer(["a"], add_special_tokens=True)
    return tokenizer


def behaviour(tokenizer: Any) -> dict[str, Any]:
    """What decides which tokens a text becomes, part by part."""
    parts: dict[str, Any] = {}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts = {key: part for key, part in json.loads(backend.to_str()).items() if key not in _IDLE}
        parts["vocabularies"] = parts.pop("model")
    elif callable(getattr(tokenizer, "get_vocab", None)):
        added = {str(token): id_ for token, id_ in getattr(tokenizer, "get_added_vocab", dict)().items()}
        parts = {"vocabularies": tokenizer.get_vocab(), "added_tokens": added, "class": type(tokenizer).__name__}
        for key in ("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "legacy"):
            parts[key] = getattr(tokenizer, key, None)
    return parts | {"split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False))}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The parts in which two behaviours differ, in plain words."""
    changed = sorted((key for key in one.keys() | other.keys() if one.get(key) != other.get(key)), reverse=True)
    return [_in_words(key, one.get(key), other.get(key)) for key in changed]


def _in_words(key: str, one: Any, other: Any) -> str:
    if key == "added_tokens" and isinstance(one, list) and isinstance(other, list):
        tokens = ({token["content"]: token for token in side} for side in (one, other))
        first, second = tokens
        contents = sorted(c for c in first.keys() | second.keys() if first.get(c) != second.get(c))
        return f"added tokens {shortened(map(repr, contents))}"
    words = {
        "post_processor": "post-processor (tokens added at the ends)",
        "pre_tokenizer": "pre-tokenizer",
        "bos_token_id": "tokens that begin a text",
        "eos_token_id": "tokens that end a text",
    }
    return words.get(key, key.replace("_", " "))
