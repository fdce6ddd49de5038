"""Which value is which class: every form, and every disagreement."""

from __future__ import annotations

from decimal import Decimal
from typing import Any, Literal

import pytest
from torch import nn

from assay.corpus.errors import BadRow, ShardError
from assay.corpus.format import ColumnFacts
from assay.recipe.errors import EngineError
from assay.recipe.models import ModelSpec
from assay.recipe.tasks.classification import ClassificationSpec
from assay.recipe.tasks.labels import ClassLabels, Models, SoftLabels, class_labels, soft_labels

INT, TEXT = ColumnFacts("int64"), ColumnFacts("string")
NAMED = ColumnFacts("int64", ("neg", "pos"))
DICTIONARY = ColumnFacts("string", ("pos", "neg"))  # as its rows came
FOLDERS = ColumnFacts("string", ("neg", "pos"), in_order=True)
BOOL, LISTS = ColumnFacts("bool"), ColumnFacts("list<double>")


class TellingSpec(ModelSpec):
    """A model that tells its outputs, or their names."""

    kind: Literal["telling"] = "telling"
    path: str = ""
    outputs: int | None = None
    names: tuple[str, ...] | None = None

    def output_size(self, model: nn.Module) -> int | None:
        return len(self.names) if self.names else self.outputs

    def label_names(self, model: nn.Module) -> tuple[str, ...] | None:
        return self.names


def models(*telling: int | tuple[str, ...] | None) -> Models:
    made: dict[str, tuple[ModelSpec, nn.Module]] = {}
    for name, told in zip("abc", telling, strict=False):
        own = {"names": told} if isinstance(told, tuple) else {"outputs": told}
        made[name] = (TellingSpec(**own), nn.Identity())
    return made


def labels_of(facts: ColumnFacts, given: Models, **keys: Any) -> ClassLabels:
    """Those of a corpus whose label column is so, for a shard of it."""
    spec = ClassificationSpec(kind="classification", **keys).seen({"label": facts})
    return class_labels(spec, "label", facts, given).for_columns({"label": facts})


SAYS = ("neg", "pos")
FORMS: list[tuple[ColumnFacts, Any, dict[str, Any], dict[Any, int]]] = [
    (INT, [2], {}, {0: 0, 1: 1, Decimal(1): 1}),
    (INT, [None], {"classes": 3}, {2: 2}),
    (INT, [SAYS], {}, {0: 0, 1: 1}),
    (INT, [2], {"labels": ["neg", "pos"]}, {0: 0, 1: 1}),
    (INT, [3], {"labels": [1, 3, 5]}, {1: 0, 3: 1, 5: 2, Decimal(3): 1}),
    (INT, [3], {"labels": {10: 2, 20: 0}}, {10: 2, 20: 0}),
    (ColumnFacts("double"), [2], {}, {0.0: 0, 1.0: 1}),
    (ColumnFacts("bool"), [2], {}, {False: 0, True: 1}),
    (ColumnFacts("bool"), [SAYS], {}, {False: 0, True: 1}),
    (ColumnFacts("bool"), [2], {"labels": [True, False]}, {True: 0, False: 1}),
    (ColumnFacts("bool"), [None], {"labels": {True: 0, False: 1}, "classes": 2}, {True: 0, False: 1}),
    (TEXT, [2], {"labels": ["neg", "pos"]}, {"neg": 0, "pos": 1}),
    (TEXT, [SAYS], {}, {"neg": 0, "pos": 1}),
    (TEXT, [SAYS, 2, SAYS], {"labels": ["neg", "pos"], "classes": 2}, {"neg": 0, "pos": 1}),
    (TEXT, [("NEGATIVE", "POSITIVE")], {"labels": {"neg": 0, "pos": 1, "good": 1}}, {"neg": 0, "pos": 1, "good": 1}),
    (NAMED, [2], {}, {0: 0, 1: 1}),
    (NAMED, [SAYS], {"labels": ["neg", "pos"]}, {0: 0, 1: 1}),
    (NAMED, [("NEGATIVE", "POSITIVE")], {"labels": {"neg": 1, "pos": 0}}, {0: 1, 1: 0}),
    (FOLDERS, [2], {}, {"neg": 0, "pos": 1}),
    (DICTIONARY, [SAYS], {}, {"neg": 0, "pos": 1}),  # a value says what it is, whatever the order
    (DICTIONARY, [2], {"labels": ["neg", "pos"]}, {"neg": 0, "pos": 1}),
    (ColumnFacts("string", ("neg",)), [2], {"labels": {"neg": 0, "pos": 1}}, {"neg": 0, "pos": 1}),  # so far
    (ColumnFacts("string", ("neg",)), [SAYS], {}, {"neg": 0, "pos": 1}),
    (DICTIONARY, [2], {"labels": {"pos": 1}}, {"pos": 1}),
    (INT, [("0", "1", "2")], {}, {0: 0, 2: 2}),
    (INT, [3], {"labels": ["0", "1", "2"]}, {0: 0, 2: 2}),
    (INT, [("1", "2")], {"labels": {1: 0, 2: 1}}, {1: 0, 2: 1}),
    (BOOL, [("False", "True")], {}, {False: 0, True: 1}),
    (BOOL, [("True", "False")], {"labels": {True: 0, False: 1}}, {False: 1, True: 0}),
    (INT, [("yes", "no")], {}, {0: 0, 1: 1}),
    (TEXT, [2], {"labels": ["1", "2"]}, {"1": 0, "2": 1}),
    (ColumnFacts("int64", ("1", "2")), [("1", "2")], {}, {0: 0, 1: 1}),  # integers that say their names
    (DICTIONARY, [3], {"labels": ["pos", "neg", "none"]}, {"neg": 1, "none": 2}),
    (ColumnFacts("mixed"), [2], {"labels": ["neg", "pos"]}, {"neg": 0, 1: 1}),
    (ColumnFacts("null"), [2], {"labels": [True, False]}, {True: 0}),
]


@pytest.mark.parametrize(("facts", "telling", "keys", "expected"), FORMS)
def test_forms(facts: ColumnFacts, telling: list[Any], keys: dict[str, Any], expected: dict[Any, int]) -> None:
    labels = labels_of(facts, models(*telling), **keys)
    assert {value: labels.encode(value) for value in expected} == expected
    assert labels.collate(list(expected.values())).tolist() == list(expected.values())


BAD: list[tuple[ColumnFacts, dict[str, Any], Any, str]] = [
    (INT, {}, None, "label is null"),
    (INT, {}, float("nan"), "label is null"),
    (INT, {}, 2, "label is 2, outside the classes 0 to 1"),
    (INT, {}, -1, "label is -1, outside the classes 0 to 1"),
    (INT, {}, 0.5, "label is 0.5, expected an integer"),
    (INT, {}, Decimal("0.5"), "label is of type Decimal, expected an integer"),
    (INT, {}, "1", "label is of type str, expected an integer"),
    (INT, {}, [1], "label is of type list, expected an integer"),
    (INT, {"labels": [3, 4]}, 1, "label is 1, not among the labels 3, 4"),
    (INT, {"labels": [0, 1]}, True, "label is True, not among the labels 0, 1"),
    (INT, {"labels": [0, 1]}, None, "label is null"),
    (ColumnFacts("mixed"), {"labels": ["1", "2"]}, 1, "label is 1, not among the labels '1', '2'"),
    (INT, {"labels": ["a", "b"]}, 2, "label is 2, outside the classes 0 to 1"),
    (TEXT, {"labels": ["a", "b"]}, "A", "label is 'A', not among the labels 'a', 'b'"),
    (TEXT, {"labels": ["a", "b"]}, None, "label is null"),
    (TEXT, {"labels": ["a", "b"]}, ["a"], "label is of type list, expected an integer"),
    (TEXT, {"labels": {"a": 0, "b": 1}}, 1, "label is 1, not among the labels 'a', 'b'"),
    (TEXT, {"labels": {"a": 0, "b": 1}}, {"a": 1}, "label is {'a': 1}, not among the labels 'a', 'b'"),
    (NAMED, {}, 2, "label is 2, outside the classes 0 to 1"),
    (NAMED, {}, -1, "label is -1, outside the classes 0 to 1"),  # how datasets writes a label that is missing
    (NAMED, {"labels": {"pos": 1}}, 0, "label is 'neg', not among the labels 'pos'"),
    (ColumnFacts("bool"), {"labels": [False, True]}, 1, "label is 1, not among the labels False, True"),
]


def test_whole_floats_are_integers() -> None:
    """Nulls make floats of a pandas column."""
    for facts, keys, telling in ((INT, {}, 2), (INT, {"labels": [0, 1]}, 2), (NAMED, {}, 2)):
        assert labels_of(facts, models(telling), **keys).encode(1.0) == 1


@pytest.mark.parametrize(("facts", "keys", "value", "reason"), BAD)
def test_values_that_are_no_label(facts: ColumnFacts, keys: dict[str, Any], value: Any, reason: str) -> None:
    labels = labels_of(facts, models(2), **keys)
    with pytest.raises(BadRow) as caught:
        labels.encode(value)
    assert str(caught.value) == reason


def test_a_long_value_is_cut() -> None:
    labels = labels_of(TEXT, models(2), labels=["a" * 500, "b"])
    with pytest.raises(BadRow) as caught:
        labels.encode("\x1b[2J" + "x" * 100_000)
    assert len(str(caught.value)) < 300
    assert "\x1b" not in str(caught.value)


REFUSED: list[tuple[ColumnFacts, list[Any], dict[str, Any], str]] = [
    (
        NAMED,
        [2],
        {"labels": ["pos", "neg"]},
        "task.labels are 'pos', 'neg', and column 'label' has the classes 'neg', 'pos'",
    ),
    (
        NAMED,
        [2],
        {"labels": ["neg", "pos", "x"]},
        "task.labels are 'neg', 'pos', 'x', and column 'label' has the classes",
    ),
    (NAMED, [2], {"labels": {"neg": 0, "pso": 1}}, "task.labels are 'neg': 0, 'pso': 1, and column 'label' has the"),
    (
        DICTIONARY,
        [2],
        {"labels": ["neg", "x"]},
        "task.labels are 'neg', 'x', and column 'label' has the classes 'pos', 'neg'",
    ),
    (NAMED, [("pos", "neg")], {}, "the labels are 'neg', 'pos', but models.a has 'pos', 'neg'; give the class of each"),
    (FOLDERS, [("pos", "neg")], {}, "the labels are 'neg', 'pos', but models.a has 'pos', 'neg'"),
    (DICTIONARY, [2], {}, "column 'label' holds strings, and nothing says which class each is; give labels"),
    (
        DICTIONARY,
        [("NEG", "POS")],
        {},
        "column 'label' has the classes 'pos', 'neg', but the models have 'NEG', 'POS'; give the class of each label",
    ),
    (DICTIONARY, [2], {"labels": {"a": 0, "b": 1}}, "task.labels are 'a': 0, 'b': 1, and column 'label' has the"),
    *(
        (facts, [5], {"labels": ["1", "2", "3", "4", "5"]}, "task.labels are '1', '2', '3', '4', '5', and column")
        for facts in (INT, ColumnFacts("double"))
    ),
    (
        INT,
        [("1", "2", "3", "4", "5")],
        {},
        "the models have the labels '1', '2', '3', '4', '5', and column 'label' holds int64 values, so that 0 and '1' "
        "might be one class or two; give the class of each value, such as labels: {1: 0, 2: 1}",
    ),
    (INT, [("a", "2.0", "c")], {}, "so that 1 and '2.0' might be one class or two"),
    (INT, [("True", "False")], {}, "so that 0 and 'True' might be one class or two"),
    (
        BOOL,
        [("True", "False")],
        {},
        "so that 0 and 'True' might be one class or two; give the class of each value, such",
    ),
    (BOOL, [("yes", "no")], {}, "such as labels: {true: 0, false: 1}"),
    (TEXT, [("NEG", "POS")], {"labels": ["neg", "pos"]}, "the labels are 'neg', 'pos', but models.a has 'NEG', 'POS'"),
    (
        INT,
        [SAYS, ("pos", "neg")],
        {},
        "models.a has the labels 'neg', 'pos', but models.b has 'pos', 'neg'; score",
    ),
    (
        INT,
        [SAYS, ("NEG", "POS")],
        {},
        "models.a has the labels 'neg', 'pos', but models.b has 'NEG', 'POS'; give",
    ),
    (
        TEXT,
        [SAYS, ("pos", "neg")],
        {"labels": {"neg": 0, "pos": 1}},
        "models.a has the labels 'neg', 'pos', but models.b has 'pos', 'neg'; score them in recipes of their own",
    ),
    (INT, [3], {"classes": 2}, "task.classes is 2, but models.a has 3 outputs"),
    (INT, [2, 3], {}, "models.a has 2 outputs, but models.b has 3 outputs"),
    (TEXT, [3], {"labels": ["neg", "pos"]}, "the labels are 2 ('neg', 'pos'), but models.a has 3 outputs"),
    (TEXT, [2], {"labels": ["a", "b"], "classes": 3}, "task.classes is 3, but the labels are 2 ('a', 'b')"),
    (TEXT, [2], {"labels": {"a": 0, "b": 2}}, "task.labels: 'b' is class 2, and the classes are 0 to 1"),
    (INT, [None], {}, "task.classes: neither labels nor the models tell how many there are; give it"),
    (TEXT, [2], {}, "column 'label' holds strings, and nothing says which class each is; give labels"),
    (TEXT, [2], {"labels": [0, 1]}, "task.labels are 0, 1, and column 'label' holds string values"),
    (TEXT, [2], {"labels": [False, True]}, "holds string values; quote them in YAML, where an unquoted yes or no is"),
    (ColumnFacts("bool"), [2], {"labels": ["no", "yes"]}, "task.labels are 'no', 'yes', and column 'label' holds bool"),
    (INT, [2], {"labels": [False, True]}, "task.labels are False, True, and column 'label' holds int64 values"),
    (INT, [2], {"labels": {"a": 0, "b": 1}}, "task.labels are 'a': 0, 'b': 1, and column 'label' holds int64 values"),
    (ColumnFacts("binary"), [2], {}, "column 'label' holds binary; expected integers, booleans or strings"),
    (ColumnFacts("timestamp[us]"), [2], {}, "column 'label' holds timestamp[us]; expected integers"),
    (ColumnFacts("struct<a: int64>"), [2], {}, "column 'label' holds struct<a: int64>; expected integers"),
    (ColumnFacts("int64", ("a", "a")), [2], {}, "column 'label' names two classes alike: 'a', 'a'; give labels"),
]


@pytest.mark.parametrize(("facts", "telling", "keys", "message"), REFUSED)
def test_disagreements_show_both_sides(
    facts: ColumnFacts, telling: list[Any], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError) as caught:
        labels_of(facts, models(*telling), **keys)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_long_list_is_cut() -> None:
    names = tuple(f"class {i}" * 30 for i in range(1000))
    with pytest.raises(EngineError) as caught:
        labels_of(TEXT, models(names), labels=[f"other {i}" for i in range(1000)])
    assert "'other 7' and 992 more, but models.a has" in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_a_shards_own_names_say_what_its_integers_are() -> None:
    first = labels_of(NAMED, models(2))
    other = first.for_columns({"label": ColumnFacts("int64", ("pos", "neg", "new"))})
    assert [first.encode(0), other.encode(0), other.encode(1)] == [0, 1, 0]
    with pytest.raises(BadRow, match="label is 'new', not among the labels 'neg', 'pos'"):
        other.encode(2)
    plain = labels_of(INT, models(2))
    with pytest.raises(ShardError, match="names its classes, 'neg', 'pos', and the recipe's labels are not names"):
        plain.for_columns({"label": NAMED})
    assert first.for_columns({"label": INT}).encode(1) == 1  # by their order


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "label is null"),
        (1, "label is of type int, expected a list of numbers"),
        ([1.0], "label holds 1 numbers, expected 2"),
        ([0.5, None], "label holds something that is not a number"),
        ([0.5, float("nan")], "label holds a NaN, an infinity or a null"),
        ([1.5, -0.5], "label holds -0.5, expected probabilities"),
        ([0.5, 0.4], "label has the sum 0.9, expected probabilities of sum 1"),
    ],
)
def test_values_that_are_no_probabilities(value: Any, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        SoftLabels("label", 2).encode(value)
    assert str(caught.value) == reason


def probabilities_of(given: Models, facts: ColumnFacts = LISTS, **keys: Any) -> SoftLabels:
    return soft_labels(ClassificationSpec(kind="classification", **keys).seen({"label": facts}), "label", given)


def test_the_order_of_probabilities_is_the_models() -> None:
    for given, labels in ((models(SAYS, 2), ["neg", "pos"]), (models(2), ["a", "b"]), (models(SAYS), None)):
        assert probabilities_of(given, labels=labels) == SoftLabels("label", 2)
    assert probabilities_of(models(SAYS, ("NEG", "POS"))) == SoftLabels("label", 2)
    for given, labels, message in (
        (models(("pos", "neg")), ["neg", "pos"], "but models.a has 'pos', 'neg'; take labels out if"),
        (models(("NEG", "POS")), ["neg", "pos"], "but models.a has 'NEG', 'POS'; take labels out if"),
        (models(SAYS, ("pos", "neg")), None, "but models.b has 'pos', 'neg'; score them in recipes of their own"),
        (models(2), {"neg": 0, "pos": 1}, "task.labels are 'neg': 0, 'pos': 1, and column 'label' is to hold"),
    ):
        with pytest.raises(EngineError) as caught:
            probabilities_of(given, labels=labels)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (ColumnFacts("list<int64>", ("neg", "pos")), "holds the classes 'neg', 'pos', not probabilities of them"),
        (ColumnFacts("list<string>"), "holds list<string>; expected lists of probabilities"),
        (ColumnFacts("list<list<struct<a: int64>>>"), "expected lists of probabilities"),
    ],
)
@pytest.mark.parametrize("soft", [True, None])
def test_lists_that_are_no_probabilities(facts: ColumnFacts, message: str, soft: bool | None) -> None:
    with pytest.raises(EngineError, match=message):
        probabilities_of(models(2), facts, soft_labels=soft)


def test_probabilities() -> None:
    labels = SoftLabels("label", 2)
    assert labels.collate([labels.encode([0, 1]), labels.encode([0.25, 0.75])]).tolist() == [[0, 1], [0.25, 0.75]]


def test_what_the_column_tells_is_part_of_the_recipe() -> None:
    spec = ClassificationSpec(kind="classification")
    assert spec.seen({"label": NAMED}).labels == ["neg", "pos"]
    assert spec.seen({"label": NAMED}).seen({"label": NAMED}) == spec.seen({"label": NAMED})
    assert spec.seen({"label": ColumnFacts("list<double>")}).soft_labels is True
    assert spec.seen({"label": INT}).soft_labels is False
    assert spec.seen({}) == spec


def test_strings_in_a_later_shard_are_not_taken_for_classes() -> None:
    plain = labels_of(INT, models(2))
    for kind in ("string", "list<string>"):
        with pytest.raises(ShardError, match="column 'label' holds strings, and nothing says which class each is"):
            plain.for_columns({"label": ColumnFacts(kind)})
