"""Cross-fitting: nobody predicts what it was trained on."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier

from assay.methods import ensemble_scores
from assay.retrain import OutOfFold, out_of_fold
from tests.methods.data import mlp, noisy_digits, train


def test_every_sample_is_predicted_by_a_model_that_did_not_see_it() -> None:
    data = noisy_digits(0.2, size=150)
    seen: list[set[bytes]] = []

    def fit(x: Any, y: Any) -> torch.nn.Module:
        seen.append({row.numpy().tobytes() for row in x})
        return train(mlp(0), x, torch.as_tensor(y), 1)

    out = out_of_fold([fit, GaussianNB()], data.x, data.given.numpy(), folds=4, seed=3)
    assert out.logits.shape == (2, 150, 10)
    assert bool(out.logits.isfinite().all())
    assert len(seen) == 4
    for row, fold in zip(data.x, out.folds, strict=True):
        assert row.numpy().tobytes() not in seen[fold]
    with torch.no_grad():
        for i in (0, 77):
            torch.testing.assert_close(out.logits[0, i], out.models[0][out.folds[i]](data.x[i : i + 1])[0])
    again = out_of_fold([GaussianNB()], data.x, data.given.numpy(), folds=4, seed=3)
    assert torch.equal(again.logits[0], out.logits[1])
    assert set(np.bincount(out.folds)) <= {37, 38}


def test_trained_models_are_taken_as_they_are() -> None:
    data = noisy_digits(0.2, size=90)
    folds = np.arange(90) % 3
    models = [train(mlp(f), data.x[folds != f], data.given[folds != f], 1) for f in range(3)]
    out = out_of_fold([models], data.x, data.given.numpy(), folds=folds)
    with torch.no_grad():
        torch.testing.assert_close(out.logits[0, folds == 1], models[1](data.x[folds == 1]))


def test_a_trained_model_is_left_as_it_was_module_by_module() -> None:
    data, folds = noisy_digits(0.2, size=40), np.arange(40) % 2
    models = [torch.nn.Sequential(torch.nn.BatchNorm1d(64), torch.nn.Dropout(), mlp(f)) for f in range(2)]
    models[0][0].eval()  # frozen by its user, in a model that is in training mode otherwise
    models[1].eval()
    modes = [[module.training for module in model.modules()] for model in models]
    out = out_of_fold([models], data.x, data.given.numpy(), folds=folds)
    assert [[module.training for module in model.modules()] for model in models] == modes
    again = out_of_fold([models], data.x, data.given.numpy(), folds=folds)
    assert torch.equal(out.logits, again.logits), "something is dropped, or a norm has moved"


@pytest.mark.parametrize(
    ("members", "folds", "y", "words"),
    [
        ([[mlp(0)]], 3, None, "one trained model per fold, 3, got 1"),
        ([GaussianNB()], 1, None, "folds: expected 2 to 30"),
        ([GaussianNB()], np.zeros(30, int), None, "at least two different folds"),
        ([GaussianNB()], np.zeros(3, int), None, r"folds: expected one per sample, shape \(30,\)"),
        ([GaussianNB()], 3, np.full(30, -1), "integer labels"),
        ([GaussianNB()], 3, np.zeros(4, int), r"y: expected one label per sample, shape \(30,\)"),
        ([GaussianNB()], np.arange(30) % 2 - 1, None, "folds: expected integers ≥ 0, got -1 in row 0"),
        ([GaussianNB()], np.arange(30) % 2 / 2, None, "folds: expected their number, or one integer ≥ 0 per sample"),
        ([GaussianNB()], ["a", "b"] * 15, None, "folds: expected their number, or one integer"),
        ([GaussianNB()], True, None, "folds: expected their number, .* got True"),
        ([GaussianNB()], 2.0, None, "folds: expected their number, .* got 2.0"),
        ([GaussianNB()], None, None, "folds: expected their number, .* got None"),
        ([GaussianNB()], 20, None, "folds: expected at most [0-9]+, the samples of the largest class, got 20"),
        ([GaussianNB()], 3, np.full(30, 4), "y: expected at least two classes to train on, got only 4"),
        ([GaussianNB()], np.arange(30) % 2, np.arange(30) % 2, "folds: outside fold 0: expected at least two classes"),
        ([], 3, None, "members: expected at least one, got none"),
        ([lambda x, y: lambda x: torch.zeros(len(x), 3)], 3, None, r"members\[0\], fold 0: expected logits of shape"),
        ([lambda x, y: lambda x: torch.zeros(len(x))], 3, None, r"members\[0\], fold 0: expected logits of shape"),
        ([lambda x, y: lambda x: (x, x)], 3, None, r"members\[0\], fold 0: expected logits of .* got tuple"),
    ],
)
def test_wrong_arguments(members: list[Any], folds: Any, y: Any, words: str) -> None:
    data = noisy_digits(0.2, size=30)
    labels = data.given.numpy() if y is None else y
    with pytest.raises(ValueError, match=words):
        out_of_fold(members, data.x, labels, folds=folds)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (GaussianNB(), "members: expected a list of models to train, got GaussianNB"),
        ([GaussianNB], r"members\[0\]: .* the class GaussianNB; give an instance"),
        ([LinearSVC()], r"members\[0\]: .* got LinearSVC, whose predict_proba is missing"),
        ([mlp(0)], r"members\[0\]: .* got Sequential, a single network"),
        (["GaussianNB"], r"members\[0\]: .* got str"),
        ([None], r"members\[0\]: .* got NoneType"),
        ([lambda x, y: None], r"members\[0\], fold 0: expected fit\(x, y\) to return the trained model, got None"),
        ([lambda x, y: "model"], r"members\[0\], fold 0: expected a trained model, .* got str"),
    ],
)
def test_wrong_members(members: Any, words: str) -> None:
    data = noisy_digits(0.2, size=60)
    with pytest.raises(TypeError, match=words):
        out_of_fold(members, data.x, data.given, folds=3)


@pytest.mark.parametrize(("name", "value"), [("seed", -1), ("seed", None), ("batch_size", 0), ("batch_size", 2.5)])
def test_wrong_numbers(name: str, value: Any) -> None:
    data = noisy_digits(0.2, size=60)
    with pytest.raises(ValueError, match=f"{name}: expected"):
        out_of_fold([GaussianNB()], data.x, data.given, folds=3, **{name: value})


@pytest.fixture
def numbers() -> tuple[np.ndarray, np.ndarray, OutOfFold]:
    """Inputs, labels and what comes of them as plain arrays."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)).astype(np.float32)
    y = (x[:, 0] + rng.normal(size=60) > 0).astype(int)
    return x, y, out_of_fold([LogisticRegression()], x, y, folds=3)


@pytest.mark.parametrize(
    "form",
    [
        scipy.sparse.csr_matrix,
        scipy.sparse.coo_array,
        lambda x: pd.DataFrame(x, columns=list("abcd"), index=np.arange(len(x))[::-1] * 3),
        torch.from_numpy,
        lambda x: torch.from_numpy(x.copy()).requires_grad_(),
        lambda x: x.tolist(),
        lambda x: [torch.from_numpy(row) for row in x],
        lambda x: tuple(x),
    ],
)
def test_every_form_of_inputs_gives_the_same(numbers: Any, form: Any) -> None:
    x, y, want = numbers
    got = out_of_fold([LogisticRegression()], form(x), y, folds=3)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)
    assert (got.folds == want.folds).all()


@pytest.mark.parametrize("ones", ["pos", True, 1.0, np.int8(1)])
@pytest.mark.parametrize(
    "form",
    [list, np.array, lambda y: pd.Series(y, index=range(5, 65)), lambda y: pd.DataFrame({"y": y}), pd.Categorical],
)
def test_every_form_of_labels_gives_the_same(numbers: Any, ones: Any, form: Any) -> None:
    x, y, want = numbers
    zeros = "neg" if ones == "pos" else type(ones)(0)
    got = out_of_fold([LogisticRegression()], x, form([ones if label else zeros for label in y]), folds=3)
    assert torch.equal(got.logits, want.logits)
    assert got.labels.tolist() == y.tolist()
    assert got.classes.tolist() == [zeros, ones]
    assert bool(ensemble_scores(got.logits, got.labels)["nll"].isfinite().all())


def test_texts_with_class_names() -> None:
    y = np.arange(30) % 3
    texts = [f"sample {i} says {word}" for i, word in enumerate(np.array(["one", "two", "three"])[y])]
    names = [("red", "green", "blue")[label] for label in y]
    out = out_of_fold([make_pipeline(CountVectorizer(), LogisticRegression())], texts, names)
    assert out.classes.tolist() == ["blue", "green", "red"]
    assert [out.classes[c] for c in out.logits[0].argmax(1)] == names
    with pytest.raises(ValueError, match=r"members\[0\], fold 0: the classifier does not take x \(list\): could not"):
        out_of_fold([LogisticRegression()], texts, names)


def test_mappings_and_data_sets_reach_the_models_as_they_are() -> None:
    class Sum(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    a = torch.randn(20, 2)
    y = np.arange(20) % 2
    out = out_of_fold([lambda x, y: Sum()], {"a": a, "b": a.numpy()}, y, batch_size=3)
    torch.testing.assert_close(out.logits[0], 2 * a)
    data = torch.utils.data.TensorDataset(a)
    out = out_of_fold([lambda x, y: lambda rows: torch.stack([row for (row,) in rows])], data, y, batch_size=3)
    assert torch.equal(out.logits[0], a)
    with pytest.raises(ValueError, match=r"x: expected columns of one length, got \{'a': 20, 'b': 3\}"):
        out_of_fold([lambda x, y: Sum()], {"a": a, "b": a[:3]}, y)
    with pytest.raises(TypeError, match=r"x: .* a scikit-learn classifier, which takes no mapping"):
        out_of_fold([GaussianNB()], {"a": a, "b": a}, y)


@pytest.mark.parametrize("folds", [np.arange(60) % 2 * 2, np.arange(60) % 2 == 1, (np.arange(60) % 2 + 3).tolist()])
def test_folds_are_numbered_from_0(numbers: Any, folds: Any) -> None:
    x, y, _ = numbers
    want = cross_val_predict(GaussianNB(), x, y, cv=PredefinedSplit(np.asarray(folds)), method="predict_log_proba")
    out = out_of_fold([GaussianNB()], x, y, folds=folds)
    np.testing.assert_allclose(out.logits[0].numpy(), want, rtol=1e-6)
    assert sorted(set(out.folds)) == [0, 1]
    trained = [GaussianNB().fit(x[out.folds != f], np.array(["a", "b"])[y[out.folds != f]]) for f in (0, 1)]
    named = out_of_fold([trained], x, np.array(["a", "b"])[y], folds=folds)
    assert torch.equal(named.logits, out.logits)
    with pytest.raises(ValueError, match=r"members\[0\], fold 0: expected a classifier of classes among .*'b'"):
        out_of_fold([trained], x, np.array(["b", "c"])[y], folds=folds)


def test_a_class_that_a_fold_is_not_trained_on_is_named(numbers: Any, caplog: pytest.LogCaptureFixture) -> None:
    x, y, _ = numbers
    y = y.copy()
    y[7] = 2
    with caplog.at_level(logging.WARNING, logger="assay"):
        out = out_of_fold([DecisionTreeClassifier(), LogisticRegression()], x, y, folds=3)
    assert f"fold {out.folds[7]}: class 2" in caplog.text
    assert out.logits.shape == (2, 60, 3)
    assert bool(out.logits.isfinite().all())
    assert out.logits[:, 7, 2].max() <= np.log(1e-6) + 1e-5


def test_rows_of_logits_that_are_no_probabilities_are_counted(numbers: Any, caplog: pytest.LogCaptureFixture) -> None:
    x, y, _ = numbers
    x = x.copy()
    x[5] = np.nan
    with caplog.at_level(logging.WARNING, logger="assay"):
        out = out_of_fold([lambda x, y: torch.nn.Linear(4, 2)], x, y, folds=3)
    assert f"members[0], fold {out.folds[5]} gives no probabilities in 1 of 20 rows" in caplog.text
    assert out.logits[0].isnan().all(1).nonzero().tolist() == [[5]]


def test_small_probabilities_are_kept_and_zeros_have_a_floor() -> None:
    """A clip at 1e-6 would make all sure mistakes alike."""
    x = np.array([[0.0], [1.0]] * 4 + [[0.5], [0.75], [1.25]])
    x[:8] += np.random.default_rng(0).normal(size=(8, 1)) * 0.02
    y = np.array([0, 1] * 4 + [0, 1, 0])
    folds = np.array([0] * 8 + [1] * 3)
    out = out_of_fold([GaussianNB(), DecisionTreeClassifier()], x, y, folds=folds)
    want = GaussianNB().fit(x[:8], y[:8]).predict_log_proba(x[8:])
    np.testing.assert_allclose(out.logits[0, 8:].numpy(), want, rtol=1e-6)
    assert out.logits[0, 8:, 0].min() < -100
    assert set(out.logits[1, 8:].flatten().tolist()) == {
        0.0,
        torch.tensor(1e-6, dtype=torch.float64).log().float().item(),
    }
