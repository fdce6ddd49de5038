"""Several models by one glob: ``seeds: {path: runs/seed-*}`` is ``seeds-1``, ``seeds-2``, … in their natural order.

A method that takes several models may name them all (``seeds``, ``seeds-*``, or the glob itself: ``runs/seed-*/``), and
wherever one model is named, ``seeds-first`` and ``seeds-last`` are the ends of that order. All of this is resolved
before anything else of a recipe is looked at, so that its identity has names of models and no paths.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from assay.recipe.parts import is_pattern, located, nearest

Keys = Callable[[Any], Mapping[str, bool]]
"""A method's kind -> its keys that name models, and whether each takes several."""


def expanded(data: Mapping[str, Any], base: str, keys_of: Keys) -> dict[str, Any]:
    """A recipe's data with every glob of models written out; a part of a wrong type is left for others to name.

    Raises:
        ValidationError: nothing matches a glob, or a name is there twice.
    """
    models, methods = data.get("models"), data.get("methods")
    if not isinstance(models, Mapping) or not isinstance(methods, list):
        return dict(data)
    methods = [dict(method) if isinstance(method, Mapping) else method for method in methods]
    models = dict(models)
    for i, method in enumerate(methods):
        if isinstance(method, dict):
            _name_globs(models, method, keys_of(method.get("method")), i)
    groups: dict[str, list[str]] = {}
    written: dict[str, Any] = {}
    for name, model in models.items():
        own = _members(name, model, base)
        if twice := own.keys() & (written.keys() | models.keys()) - {name}:
            raise located(("models", name), f"several models are called {min(twice)!r}")
        written |= own
        if name not in own:
            groups[name] = list(own)
    for i, method in enumerate(methods):
        if isinstance(method, dict):
            for key, several in keys_of(method.get("method")).items():
                if key in method:
                    method[key] = _resolved(method[key], groups, written, several, ("methods", i, key))
    return {**data, "models": written, "methods": methods}


def _name_globs(models: dict[str, Any], method: dict[str, Any], keys: Mapping[str, bool], i: int) -> None:
    """A path in place of a name becomes a model of its own."""
    for key, several in keys.items():
        value = method.get(key)
        items = [value] if isinstance(value, str) else value
        if not several or not isinstance(items, list):
            continue
        for k, item in enumerate(items):
            if isinstance(item, str) and ("/" in item or os.sep in item) and not _matching(models, item):
                name = _name_of(item)
                model = {"kind": "mlp" if item.endswith(".safetensors") else "transformers", "path": item}
                if models.setdefault(name, model) != model:
                    raise located(("methods", i, key), f"{item} would be called {name!r}, as another model is", item)
                items = [*items[:k], name, *items[k + 1 :]]
        method[key] = value if isinstance(value, str) and items == [value] else items


def _matching(models: Iterable[Any], pattern: str) -> list[str]:
    """The models of that name, or whose names match it."""
    return [
        name for name in models if isinstance(name, str) and (name == pattern or fnmatch.fnmatchcase(name, pattern))
    ]


def _name_of(path: str) -> str:
    """``runs/seed-*/`` -> ``seed``: the last part that says anything."""
    parts = [re.sub(r"\[.*?\]|[*?]|\.(safetensors|gguf)$", "", part).strip("-_.") for part in re.split(r"[/\\]", path)]
    return next((part for part in reversed(parts) if part), "models")


def _members(name: str, model: Any, base: str) -> dict[str, Any]:
    """One model, or those that its path's or its adapter's glob finds."""
    keys = [key for key in ("path", "adapter") if isinstance(model, Mapping) and _is_glob(model.get(key), base)]
    if not keys:
        return {name: model}
    if len(keys) > 1:
        raise located(("models", name), "path and adapter are globs both; expected one of one model")
    key = keys[0]
    paths = matches(model[key], base)
    if not paths:
        raise located(("models", name, key), f"nothing matches {model[key]}", model[key])
    return {f"{name}-{i}": {**model, key: path} for i, path in enumerate(paths, 1)}


def _is_glob(path: Any, base: str) -> bool:
    """Whether a path stands for several; one that is there is itself, whatever its name."""
    return isinstance(path, str) and is_pattern(path) and not os.path.exists(_joined(base, path))


def _joined(base: str, path: str) -> str:
    return os.path.join(base, os.path.expanduser(path))


def matches(pattern: str, base: str = "") -> list[str]:
    """What a glob finds, ``seed-2`` before ``seed-10``."""
    found = {path.rstrip("/" + os.sep) for path in glob.glob(_joined(glob.escape(base), pattern))}
    return sorted(found, key=lambda path: (_naturally(path), path))


def _naturally(path: str) -> list[str | int]:
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", path))]


def _resolved(
    value: Any, groups: Mapping[str, list[str]], models: Collection[str], several: bool, where: tuple[str | int, ...]
) -> Any:
    """The names of models that a method's key stands for."""
    ends = {f"{name}-{end}": own[at] for name, own in groups.items() for end, at in (("first", 0), ("last", -1))}
    ends = {name: model for name, model in ends.items() if name not in models}
    if not several:
        if isinstance(value, str) and value in groups:
            own = groups[value]
            raise located(where, f"{value!r} is {len(own)} models; name one of them, such as {own[-1]!r}", value)
        return ends.get(value, value) if isinstance(value, str) else value
    if isinstance(value, str) and (value in groups or is_pattern(value)):
        value = [value]
    if not isinstance(value, list):
        return value
    names: list[Any] = []
    for item in value:
        if isinstance(item, str) and item in groups:
            names += groups[item]
        elif isinstance(item, str) and is_pattern(item) and item not in models:
            found = _matching(models, item)
            if not found:
                raise located(where, f"no model's name matches {item!r}; {nearest(item, map(str, models))}", item)
            names += found
        else:
            names.append(ends.get(item, item) if isinstance(item, str) else item)
    return names
