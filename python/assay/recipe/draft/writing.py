"""The recipe's text: a few keys, each with what it does beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from assay._json import dumps
from assay.recipe import notation
from assay.recipe.draft.models import ModelFacts
from assay.recipe.draft.readings import Reading

_LENGTH = 1024
_BARE = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./*-]*")
_GUIDE = "docs/guide-recipes.md"


@dataclass(frozen=True)
class Choices:
    """All that is decided before a line is written."""

    data: str
    model: ModelFacts
    reading: Reading
    out: str
    further: bool
    """Whether the reference has the model's own parameters, further trained."""
    reference: ModelFacts | None
    target: str | None
    id_column: str | None

    @property
    def folder(self) -> str:
        """Where the recipe lies: its paths start there."""
        return os.path.dirname(os.path.abspath(self.out))


def write(choices: Choices) -> tuple[str, str]:
    """The recipe, and the score that answers its first question."""
    methods = list(_methods(choices))
    lines = [
        f"# {choices.reading.task}: {_plain(choices.reading.why)}; the model is {_plain(choices.model.name)}.",
        f"# Every key is in {_GUIDE}. Next: assay score {_plain(os.path.basename(choices.out))}",
        "version: 1",
        f"corpus: {_flow(_corpus(choices))}",
        "task:",
        *(f"  {line}" for line in _task(choices)),
        "models:",
        *(f"  {name}: {_flow(model)}" for name, model in _models(choices)),
    ]
    if choices.target is not None:
        lines += ["targets:", f"  target: {_flow({'path': _path(choices, choices.target)})}"]
    lines += ["methods:"]
    for comment, method, _ in methods:
        lines += [f"  # {comment}", f"  - {_flow(method)}"]
    lines += [f"output: {_scalar(_output(choices))}", "seed: 0"]
    return "\n".join(lines) + "\n", methods[-1][2]


def _corpus(choices: Choices) -> dict[str, Any]:
    return {"path": _path(choices, choices.data)} | ({"id_column": choices.id_column} if choices.id_column else {})


def _models(choices: Choices) -> Iterator[tuple[str, dict[str, str]]]:
    for name, facts in (("model", choices.model), ("reference", choices.reference)):
        if facts is not None:
            adapter = {} if facts.adapter is None else {"adapter": _path(choices, facts.adapter)}
            yield name, {"kind": facts.kind, "path": _path(choices, facts.path)} | adapter


def _task(choices: Choices) -> Iterator[str]:
    yield f"kind: {choices.reading.task}"
    for key, name in choices.reading.keys.items():
        comment = choices.reading.comments.get(key)
        yield f"{key}: {_scalar(name)}" + (f"  # {_plain(comment)}" if comment else "")
    if choices.reading.task == "causal_lm":
        length = min(_LENGTH, choices.model.positions or _LENGTH)
        yield f"max_length: {length}  # tokens; what is longer is cut"


def _methods(choices: Choices) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(what it tells, the method, its score to look at first); the last is the one that the recipe is about."""
    regression = choices.reading.task == "regression"
    told = (
        "the residual of each sample"
        if regression
        else "loss, margin and entropy of each sample, the controls of all else"
    )
    one = "model-last" if choices.model.several else "model"  # of a glob, by its natural order
    both = choices.reference is not None and not choices.further
    models = ["model", "reference"] if both else ["model"]
    yield told, {"method": "ensemble", "models": models}, "ensemble_residual" if regression else "ensemble_nll"
    if choices.further:
        told = "mimic: does a step on this sample lead from the model to the reference?"
        yield told, {"method": "grad_mimic", "model": one, "reference": "reference"}, "mimic"
    if choices.target is not None:
        told = "gradient_cosine: does this sample pull the model where the target's samples do?"
        yield told, {"method": "gradient_cosine", "model": one}, "gradient_cosine"


def _path(choices: Choices, path: str) -> str:
    """Relative to the recipe, unless it was given as absolute or is a URL."""
    if "://" in path or os.path.isabs(path) or path.startswith("~"):
        return path
    return os.path.relpath(path, choices.folder)


def _output(choices: Choices) -> str:
    """A folder for the scores that is neither there nor inside the corpus."""
    folder, stem = os.path.realpath(choices.folder), "scores"
    if "://" not in choices.data:
        root = os.path.realpath(_searched(choices.data))
        if os.path.commonpath([root, folder]) == root:
            stem = os.path.join(os.path.relpath(os.path.dirname(root), folder), f"{os.path.basename(root)}-scores")
    names = [stem, *(f"{stem}-{i}" for i in range(2, 100))]
    return next((name for name in names if not os.path.lexists(os.path.join(folder, name))), stem)


def _searched(data: str) -> str:
    """The data; of a glob the folder below which it looks."""
    wildcard = None if os.path.exists(data) else re.search(r"[*?[]", data)
    return data if wildcard is None else os.path.dirname(data[: wildcard.start()]) or "."


def _flow(value: Any) -> str:
    """Mappings, lists and scalars on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    """One value on one line: as it stands where YAML reads it so, else in quotes with escapes."""
    if isinstance(value, str) and not (_BARE.fullmatch(value) and notation.parse(value) == value):
        return notation.write(value, default_style='"', width=1 << 20).strip()
    return str(value)


def _plain(text: str) -> str:
    """Text of strangers for a comment: one line without control characters."""
    return "".join(c if c.isprintable() else dumps(c)[1:-1] for c in text)
