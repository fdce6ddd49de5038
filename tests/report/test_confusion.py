"""Labels against the models' predictions."""

from __future__ import annotations

import numpy as np
import pytest

from assay.corpus.errors import CorpusError
from assay.corpus.scores_folder import open_scores
from assay.report import count_labels
from tests.report.small_report import make_scores

LABELS = ["cat", "dog", "cat", "cat", None, "dog", "owl"]
PREDICTED = [0, 1, 1, 1, 0, np.nan, 2]


def count(root, labels, given, **more):
    folder = make_scores(root, {"label": labels}, {"p": PREDICTED}, task={"kind": "classification"}, **more)
    return count_labels(open_scores(str(folder)), "p", "label", given)


def test_names_and_their_classes(tmp_path):
    found = count(tmp_path, LABELS, ["cat", "dog", "owl"], quarantined=[(2, "bad")])
    assert found.counts == {("cat", 0): 1, ("dog", 1): 1, ("cat", 1): 1, ("owl", 2): 1}
    assert (found.agree, found.rows, found.all_rows) == (3, 6, True)
    assert found.most() == [("cat", 1, 1)]
    assert found.names == {0: "cat", 1: "dog", 2: "owl"}


@pytest.mark.parametrize(
    ("labels", "given", "agree"),
    [
        ([0, 1, 0, 0, 2, 1, 2], None, 3),
        ([0.0, 1.0, 0.0, 0.0, None, 1.0, 2.0], None, 3),
        ([5, 6, 5, 5, 7, 6, 7], {"5": 0, "6": 1, "7": 2}, 3),
        ([1, 0, 1, 1, 0, 1, 2], ["cat", "dog", "owl"], 4),
        ([True, False, True, True, False, False, False], {"true": 0, "false": 1}, 2),
        (LABELS, None, None),
        (LABELS, ["cat", "dog"], None),
    ],
)
def test_what_the_recipe_says_of_labels(tmp_path, labels, given, agree):
    found = count(tmp_path, labels, given)
    assert found.agree == agree
    assert sum(found.counts.values()) == sum(
        label is not None and not np.isnan(predicted) for label, predicted in zip(labels, PREDICTED, strict=True)
    )
    assert bool(found.most()) == (agree is not None)


def test_numbers_stand_for_names(tmp_path):
    found = count(tmp_path, [1, 0, 1, 1, 0, 1, 2], ["cat", "dog", "owl"])
    assert found.most() == [("cat", 1, 1), ("dog", 0, 1)]


def test_no_more_than_a_million_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("assay.report.confusion.MOST_ROWS", 2)
    found = count(tmp_path, LABELS, ["cat", "dog", "owl"])
    assert (found.counts, found.rows, found.all_rows) == ({("cat", 0): 1, ("dog", 1): 1}, 2, False)


def test_what_cannot_be_compared_says_why(tmp_path):
    folder = make_scores(tmp_path, {"text": ["a", "b"]}, {"p": [0, 1]})
    scores = open_scores(str(folder))
    with pytest.raises(CorpusError, match=r"a\.parquet has no column label any more"):
        count_labels(scores, "p", "label", None)
    (tmp_path / "data/a.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorpusError, match=r"a\.parquet cannot be read: "):
        count_labels(scores, "p", "label", None)
    long = make_scores(tmp_path / "long", {"label": ["x" * 1001] * 2}, {"p": [0, 1]})
    with pytest.raises(CorpusError, match="so long values that they are no classes"):
        count_labels(open_scores(str(long)), "p", "label", None)
