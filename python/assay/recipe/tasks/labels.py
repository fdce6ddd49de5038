"""The labels of a recipe's samples: which value of a column is which class of the models.

Their order comes from the recipe, the column's own type or the models' configs; what these say must agree. A value is
matched by what it says wherever that is known: ``ClassLabel`` integers by the names that their own shard gives them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from assay.corpus.checks import check_label, check_probabilities, shown
from assay.corpus.errors import BadRow, ShardError
from assay.corpus.format import ColumnFacts
from assay.recipe.errors import EngineError
from assay.recipe.model_files import shortened
from assay.recipe.parts import Part
from assay.recipe.tasks.base import Columns, Models
from assay.tasks.base import SUM_TOLERANCE
from assay.tasks.special_tokens import setting

log = logging.getLogger("assay")

Label = bool | int | str

NUMBERS = ("int", "uint", "float", "double", "halffloat", "decimal")
# A mean of probabilities may be added up in another order where it is checked again.
_TOLERANCE = SUM_TOLERANCE * (1 - 1e-6)
_REMEDY = "give the class of each label, such as labels: {spam: 1, ham: 0}"


class LabelKeys(Part):
    """The keys of a task whose labels are classes."""

    classes: Annotated[int, Field(ge=1)] | None = None
    labels: list[Label] | dict[Label, int] | None = None

    @field_validator("labels", mode="before")
    @classmethod
    def _is_known_labels(cls, labels: Any) -> Any:
        if fault := "" if labels is None else _fault(labels):
            raise PydanticCustomError("assay", "{message}", {"message": fault})
        return labels


def _fault(labels: Any) -> str:
    """What is the matter with a recipe's labels."""
    if not isinstance(labels, list | dict) or not labels:
        return "expected a list of labels in the order of their classes, or a mapping of labels to classes"
    kinds = {type(label) for label in labels}
    if len(kinds) > 1 or not kinds <= {bool, int, str}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        return f"are of type {names}; expected str, int or bool throughout (an unquoted no is a bool in YAML)"
    if isinstance(labels, list) and len(set(labels)) < len(labels):
        return f"name {next(label for label in labels if labels.count(label) > 1)!r} twice"
    if isinstance(labels, dict) and (
        wrong := [place for place in labels.values() if type(place) is not int or place < 0]
    ):
        return f"expected the class of each label, 0 or more, found {shown(wrong[0])}"
    return ""


def labels_seen(keys: LabelKeys, column: str, facts: ColumnFacts | None) -> list[Label] | dict[Label, int] | None:
    """The labels with the column's own names filled in.

    Raises:
        EngineError: the column holds no labels, or others than the recipe says.
    """
    if facts is None:
        return keys.labels
    kind, given = facts.type, keys.labels
    if not _may_be_labels(kind):
        raise EngineError(f"column {column!r} holds {shortened([kind])}; expected integers, booleans or strings")
    _check_types(column, kind, given, facts.classes)
    names = facts.classes
    if names is None:
        return given
    if given is None:
        if _is_text(kind) and not facts.in_order:
            return None
        if len(set(names)) < len(names):
            raise EngineError(f"column {column!r} names two classes alike: {_listed(names)}; give labels")
        return list(names)
    if not _agree(given, names, kind):
        raise EngineError(
            f"task.labels are {_listed(given)}, and column {column!r} has the classes {_listed(names)}; take labels "
            f"out, or {_REMEDY}"
        )
    return given


def _agree(given: list[Label] | dict[Label, int], names: tuple[str, ...], kind: str) -> bool:
    """Whether a recipe's labels may be those of a column with classes of these names."""
    if _is_text(kind):  # a value says what it is, whatever the order; a dictionary's beginning may lack some
        known = [name in given for name in names]
        return not names or (any(known) if isinstance(given, dict) else all(known))
    if isinstance(given, dict):  # rows of names without a class are no samples
        return all(label in names for label in given)
    return tuple(given) == names


def _may_be_labels(kind: str) -> bool:
    return kind in ("bool", "mixed", "null", "string") or kind.startswith(NUMBERS)


def item_type(kind: str) -> str:
    """Of a list what its items are."""
    return kind.removeprefix("list<").removesuffix(">") if kind.startswith("list<") else kind


def _is_text(kind: str) -> bool:
    return kind == "string"


def _check_types(
    column: str, kind: str, given: Sequence[Label] | Mapping[Label, int] | None, names: tuple[str, ...] | None
) -> None:
    """EngineError if no value of the column can be one of the labels."""
    if given is None or kind in ("mixed", "null"):
        return
    label = next(iter(given))
    holds = "string" if _is_text(kind) else "bool" if kind == "bool" else "int"
    # Names in order stand for 0, 1, 2, … too; those of a ClassLabel are the column's.
    if type(label).__name__ == holds or (
        holds == "int" and isinstance(label, str) and (names is not None or isinstance(given, list))
    ):
        if names is None and not isinstance(given, Mapping):
            _check_places(column, kind, "task.labels are", given)
        return
    if isinstance(label, str) and holds == "string":
        return
    quote = "; quote them in YAML, where an unquoted yes or no is a Boolean" if isinstance(label, bool) else ""
    raise EngineError(f"task.labels are {_listed(given)}, and column {column!r} holds {kind} values{quote}")


def _check_places(column: str, kind: str, told: str, names: Sequence[Label]) -> None:
    """EngineError if names in order, which 0, 1, 2, … may stand for, say otherwise which of these they are."""
    if (kind == "bool" or kind.startswith(NUMBERS)) and (wrong := _misplaced(names, kind)) is not None:
        raise EngineError(
            f"{told} {_listed(names)}, and column {column!r} holds {kind} values, so that {names.index(wrong)} and "
            f"{shown(wrong)} might be one class or two; give the class of each value, such as "
            f"labels: {'{true: 0, false: 1}' if kind == 'bool' else '{1: 0, 2: 1}'}"
        )


def _misplaced(names: Sequence[Label], kind: str = "") -> Label | None:
    """The first name that is the numeral, or the truth value, of another place than its own."""
    return next((name for i, name in enumerate(names) if _place_said(name, kind) not in (None, i)), None)


def _place_said(name: Label, kind: str) -> float | None:
    words = {"false": 0, "true": 1} | ({"no": 0, "yes": 1} if kind == "bool" else {})
    if not isinstance(name, str) or (word := name.strip().lower()) in words:
        return words[word] if isinstance(name, str) else None
    try:
        number = float(word)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


@dataclass(frozen=True)
class ClassLabels:
    """A class index per value.

    Attributes:
        column: where labels come from.
        classes: how many classes the models have.
        places: by label its class; None if labels are class indices.
        ordered: whether the labels are names of the classes 0, 1, 2, …, so that these may stand for them.
        names: what a shard's integers stand for, if its column says.
    """

    column: str
    classes: int
    places: Mapping[Label, int] | None = None
    ordered: bool = False
    names: tuple[str, ...] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        places = None if self.places is None else [[label, place] for label, place in self.places.items()]
        return {"classes": self.classes, "labels": places}

    def for_columns(self, columns: Columns) -> ClassLabels:
        """For a shard, whose names for integers may differ from another's."""
        facts = columns.get(self.column)
        if facts is not None and _is_text(item_type(facts.type)) and self.places is None:
            raise ShardError(_no_order(self.column))
        if facts is None or facts.classes is None or not item_type(facts.type).startswith(("int", "uint")):
            return replace(self, names=None)
        if self.places is None or not isinstance(next(iter(self.places)), str):
            raise ShardError(
                f"column {self.column!r} names its classes, {_listed(facts.classes)}, and the recipe's labels are not "
                "names; give labels"
            )
        return replace(self, names=facts.classes)

    def encode(self, value: Any) -> int:
        """The class of a value. BadRow if it has none."""
        if type(value) is int and self._is_index and 0 <= value < self.classes:
            return value
        if isinstance(value, Decimal) and value.is_finite() and value == value.to_integral_value():
            value = int(value)
        if self.names is not None:
            return self._place(self.names[check_label(self.column, value, len(self.names))])
        if self.places is None or self.ordered:
            value = int(value) if isinstance(value, bool) else value
            if self.places is None or not isinstance(value, str):
                return check_label(self.column, value, self.classes)
        return self._place(value)

    @cached_property
    def _is_index(self) -> bool:
        """Whether an integer is the class itself."""
        return self.names is None and (self.places is None or self.ordered)

    def _place(self, value: Any) -> int:
        assert self.places is not None
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise BadRow(f"{self.column} is null")
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # nulls make floats of a pandas column
        # True is not 1 here.
        if type(value) is not type(next(iter(self.places))) or value not in self.places:
            raise BadRow(f"{self.column} is {shown(value)}, not among the labels {_listed(list(self.places))}")
        return self.places[value]

    def collate(self, labels: Sequence[int]) -> torch.Tensor:
        return torch.tensor(labels, dtype=torch.int64)


def check_probability_column(keys: LabelKeys, column: str, facts: ColumnFacts | None) -> None:
    """EngineError if a column holds no probabilities of classes, or the recipe's labels are not in their order."""
    if isinstance(keys.labels, dict):
        raise EngineError(
            f"task.labels are {_listed(keys.labels)}, and column {column!r} is to hold probabilities, which are in the "
            "order of the classes; take labels out, or give a list in that order"
        )
    if facts is None:
        return
    if facts.classes is not None:
        raise EngineError(
            f"column {column!r} holds the classes {_listed(facts.classes)}, not probabilities of them; expected one "
            "class per sample, or a list of a probability for each class"
        )
    kind = facts.type
    while item_type(kind) != kind:
        kind = item_type(kind)
    if kind != facts.type and kind.startswith(("string", "binary", "struct")):
        raise EngineError(f"column {column!r} holds {shortened([facts.type])}; expected lists of probabilities")


@dataclass(frozen=True)
class SoftLabels:
    """A list of probabilities per sample, one for each class."""

    column: str
    classes: int

    @property
    def identity(self) -> dict[str, Any]:
        return {"classes": self.classes, "soft": True}

    def for_columns(self, columns: Columns) -> SoftLabels:
        return self

    def encode(self, value: Any) -> npt.NDArray[np.float32]:
        return check_probabilities(self.column, value, self.classes, _TOLERANCE)

    def collate(self, labels: Sequence[npt.NDArray[np.float32]]) -> torch.Tensor:
        return torch.from_numpy(np.stack(labels)).clone()


def class_labels(keys: LabelKeys, column: str, facts: ColumnFacts | None, models: Models) -> ClassLabels:
    """What the recipe, its column (``labels_seen``) and its models say of the classes together.

    Raises:
        EngineError: two of them disagree, or nobody says what must be known.
    """
    names = _names(keys.labels, models)
    places: Mapping[Label, int] | None = keys.labels if isinstance(keys.labels, dict) else None
    if names is not None and places is None:
        places = {name: i for i, name in enumerate(names)}
        if len(places) < len(names):
            places = None  # the models' names are no names; 0, 1, 2, … remain
    classes = class_count(keys, names, models)
    if places is not None and max(places.values()) >= classes:
        wrong = next(label for label, place in places.items() if place >= classes)
        raise EngineError(
            f"task.labels: {shown(wrong)} is class {places[wrong]}, and the classes are 0 to {classes - 1}"
        )
    if facts is not None and facts.type == "string" and places is None:
        raise EngineError(_no_order(column))
    if names is not None and keys.labels is None:
        _check_models_names(column, names, facts)
    listed = None if isinstance(keys.labels, dict) or places is None else list(places)
    ordered = listed is not None and isinstance(listed[0], str) and _misplaced(listed) is None
    return ClassLabels(column, classes, places, ordered)


def _check_models_names(column: str, names: Sequence[Label], facts: ColumnFacts | None) -> None:
    """EngineError if what the models call their classes may not be what the column holds."""
    kind, own = ("null", ()) if facts is None else (facts.type, facts.classes or ())
    _check_places(column, kind, "the models have the labels", names)
    if kind == "string" and any(name not in names for name in own):
        raise EngineError(
            f"column {column!r} has the classes {_listed(own)}, but the models have {_listed(names)}; {_REMEDY}"
        )
    if not kind.startswith(NUMBERS):
        log.info("labels of column %r, in order: %s", column, _listed(names))


def soft_labels(keys: LabelKeys, column: str, models: Models) -> SoftLabels:
    """The same of probabilities, whose order is that of the classes; labels but name them."""
    return SoftLabels(column, class_count(keys, _names(keys.labels, models, soft=True), models))


def _no_order(column: str) -> str:
    return (
        f"column {column!r} holds strings, and nothing says which class each is; give labels in the order of the "
        "models' outputs"
    )


def class_count(keys: LabelKeys, names: Sequence[Label] | None, models: Models) -> int:
    """The number of classes; EngineError unless all who tell agree, and somebody does."""
    told: dict[str, int] = {}
    if keys.classes is not None:
        told["task.classes"] = keys.classes
    if isinstance(keys.labels, list):
        told["task.labels"] = len(keys.labels)
    for name, (spec, model) in models.items():
        outputs = spec.output_size(model)
        if outputs is not None:
            told[f"models.{name}"] = outputs
    if not told:
        raise EngineError("task.classes: neither labels nor the models tell how many there are; give it")
    (first, count), *others = told.items()
    for key, other in others:
        if other != count:
            raise EngineError(f"{_counted(first, count, keys)}, but {_counted(key, other, keys)}")
    if names is not None and len(names) != count:
        raise EngineError(f"{_counted(first, count, keys)}, but the models name {len(names)}: {_listed(names)}")
    return count


def _counted(key: str, count: int, keys: LabelKeys) -> str:
    if key == "task.classes":
        return f"{key} is {count}"
    if key == "task.labels":
        return f"the labels are {count} ({_listed(keys.labels or ())})"
    return f"{key} has {count} outputs"


def _names(given: list[Label] | dict[Label, int] | None, models: Models, soft: bool = False) -> Sequence[Label] | None:
    """The classes' names in order, if somebody tells; EngineError if two disagree."""
    remedy = "take labels out if the probabilities are in the models' order" if soft else _REMEDY
    first: tuple[str, Sequence[Label]] | None = ("the labels are", given) if isinstance(given, list) else None
    for name, (spec, model) in models.items():
        own = spec.label_names(model)
        if own is None:
            continue
        if first is None:
            first = f"models.{name} has the labels", own
        elif tuple(first[1]) != own:
            permuted = set(first[1]) == set(own)
            if not permuted and (isinstance(given, dict) or (soft and given is None)):
                continue  # other words for the same classes: the recipe says which is which, or nothing goes by words
            if permuted and first[1] is not given:
                remedy = "score them in recipes of their own"
            raise EngineError(f"{first[0]} {_listed(first[1])}, but models.{name} has {_listed(own)}; {remedy}")
    return None if first is None else first[1]


def _listed(labels: Any) -> str:
    """A few labels, cut to fit."""
    if isinstance(labels, Mapping):
        return shortened([f"{shown(label)}: {place}" for label, place in labels.items()], 8)
    return shortened([shown(label) for label in labels], 8)


def check_problem(models: Models, wanted: str) -> None:
    """EngineError for a model of transformers whose config says that it was trained for another kind of label."""
    for name, (_, model) in models.items():
        config = getattr(model, "config", None)
        found = setting(config, "problem_type")
        if found is not None and found != wanted:
            raise EngineError(f"models.{name}: its config's problem_type is {shown(found)}, and this task is {wanted}")
        if wanted != "regression" and setting(config, "num_labels") == 1:
            raise EngineError(f"models.{name}: has one output, and this task compares classes; see kind: regression")
