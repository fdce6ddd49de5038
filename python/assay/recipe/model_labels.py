"""The labels of classifiers: what a config says of them, and what of that a recipe can use."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from assay.recipe.errors import EngineError
from assay.recipe.model_files import shortened

LABEL_KEYS = frozenset({"num_labels", "id2label", "label2id"})
_MAX_LABELS, _MAX_NAME = 1_000_000, 1_000
_CLASSIFIER = re.compile(r"For(Sequence|Token|Image)Classification")


def has_labels(name: str) -> bool:
    """Whether a class of transformers, or an auto class, is one whose models have a logit per label."""
    return bool(_CLASSIFIER.search(name))


def check_architecture(path: str, values: Mapping[str, Any], auto_class: str) -> None:
    """Refuse a classifier of another kind: its head may have the right names and shapes, and still mean something
    else."""
    given = values.get("architectures")
    named = [str(name) for name in given] if isinstance(given, list) else []
    kinds = {match[0] for name in named if (match := _CLASSIFIER.search(name))}
    wanted = _CLASSIFIER.search(auto_class)
    if wanted and kinds and wanted[0] not in kinds:
        raise EngineError(f"{path}: was trained as {shortened(named)}; this task needs one {wanted[0]}")


def read_labels(path: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The labels' keys of a config, checked: their number, or names for 0, 1, 2, ….

    Raises:
        EngineError: they are not numbered so, are no texts, or contradict one another.
    """
    number, names = values.get("num_labels"), values.get("id2label")
    if number is not None and (type(number) is not int or not 1 <= number <= _MAX_LABELS):
        raise EngineError(f"{path}: num_labels is {shortened([str(number)])}; expected a number of classes")
    if names is None:
        return {} if number is None else {"num_labels": number}
    if not isinstance(names, dict) or not 0 < len(names) <= _MAX_LABELS:
        raise EngineError(f"{path}: id2label must map 0, 1, 2, … to the labels' names")
    if names.keys() != {str(i) for i in range(len(names))}:
        other = shortened(sorted(names.keys() - {str(i) for i in range(len(names))}))
        raise EngineError(f"{path}: id2label has {len(names)} labels, and {other} among them; expected 0, 1, 2, …")
    if wrong := [key for key, name in names.items() if not isinstance(name, str) or len(name) > _MAX_NAME]:
        raise EngineError(f"{path}: id2label: the name of label {shortened(wrong)} is no text of a usual length")
    if number not in (None, len(names)):
        raise EngineError(f"{path}: num_labels is {number}, but id2label has {len(names)} labels")
    _check_numbers(path, names, values.get("label2id"))
    ordered = {str(i): names[str(i)] for i in range(len(names))}
    return {"id2label": ordered, "label2id": {name: int(i) for i, name in reversed(ordered.items())}}


def _check_numbers(path: str, names: Mapping[str, str], numbers: Any) -> None:
    """label2id may say other names (often it was left at its defaults), but not other numbers of the same ones."""
    if numbers is None:
        return
    if not isinstance(numbers, dict):
        raise EngineError(f"{path}: label2id must map the labels' names to 0, 1, 2, …")
    known = set(names.values())
    if wrong := [name for name, i in numbers.items() if name in known and names.get(str(i)) != name]:
        said = f"{shortened(wrong[:1])} is {shortened([str(numbers[wrong[0]])])}"
        raise EngineError(f"{path}: label2id says that {said}, and id2label says otherwise; set both to what is true")


def output_size(model: nn.Module) -> int | None:
    """The number of labels of a classifier of transformers; None for other models."""
    number = getattr(getattr(model, "config", None), "num_labels", None)
    return number if has_labels(type(model).__name__) else None


def label_names(model: nn.Module) -> tuple[str, ...] | None:
    """The names of a classifier's labels, in the order of its logits; None where its config gives none of its own."""
    if not (number := output_size(model)):
        return None
    names: Mapping[int, str] = getattr(model, "config").id2label  # noqa: B009 (nn.Module has no such attribute)
    return own_names([names[i] for i in range(number)])


def own_names(names: Sequence[str]) -> tuple[str, ...] | None:
    """Classes' names; None for transformers' own, LABEL_0, LABEL_1, …"""
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else tuple(names)


def check_padding_token(path: str, model: Any) -> None:
    """Refuse a classifier that looks for a text's last token by the padding token, and has none."""
    if not has_labels(type(model).__name__) or model.main_input_name != "input_ids":
        return
    config = model.config.get_text_config()
    padding = getattr(config, "pad_token_id", None)
    code = inspect.unwrap(type(model).forward).__code__
    if "pad_token_id" in code.co_names and padding is None:
        raise EngineError(
            f"{path}: {type(model).__name__} finds a text's last token by pad_token_id, and the config has none; set "
            "it to what it was trained with, or to a token that no text ends with"
        )
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if padding is not None and rows is not None and not 0 <= padding < rows:
        raise EngineError(f"{path}: pad_token_id is {padding}, and the model knows the tokens below {rows}")
