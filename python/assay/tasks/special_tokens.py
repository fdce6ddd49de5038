"""The tokens that a model's config names: one that is none of the model's is not taken for one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn


class SpecialToken(NamedTuple):
    """``number`` is None if the model has no such token, and ``why_none`` then says why."""

    number: int | None
    why_none: str = ""


def special_token(model: nn.Module, key: str) -> SpecialToken:
    """What the config that a model has for texts says under ``key``, such as ``bos_token_id``: a token of its
    vocabulary, or a list of one. A list of several names none, for nothing says which is meant."""
    found = setting(text_config(model), key)
    if found is None:
        return SpecialToken(None, f"the config has no {key}")
    one = found[0] if isinstance(found, list | tuple) and len(found) == 1 else found
    if not isinstance(one, int) or isinstance(one, bool):
        return SpecialToken(None, f"{key} is {found!r}, which is no token")
    rows = _vocabulary(model)
    if one < 0 or (rows is not None and one >= rows):
        return SpecialToken(None, f"{key} is {one}" + ("" if rows is None else f", and the model has {rows} tokens"))
    return SpecialToken(one)


def text_config(model: nn.Module) -> Any:
    """The part of a model's config that is about texts, which is the whole of it in most; None if it has none."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    return text() if callable(text) else config


def setting(config: Any, key: str) -> Any:
    """What a model's config says, which of a model written in Python may be anything; None if it does not."""
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def _vocabulary(model: nn.Module) -> int | None:
    find = getattr(model, "get_input_embeddings", None)
    try:
        rows = getattr(find(), "num_embeddings", None) if callable(find) else None
    except NotImplementedError:  # transformers', of a model that embeds no texts
        return None
    return rows if isinstance(rows, int) else None
