"""Scores as columns of a data set: by id and by row, and nothing that does not match."""

from __future__ import annotations

import datasets
import numpy as np
import pyarrow as pa
import pytest

from assay.engine.local import run
from assay.recipe.recipe import load_recipe
from assay.train import WeightedSampler, join
from tests.small_project import make_rows


def dataset(ids=("a", "b", "c")) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"id": list(ids), "x": list(range(len(ids)))})


def scores(**columns) -> pa.Table:
    made = {"row": pa.array([0, 1, 2]), "id": ["c", "a", "b"], "s": pa.array([3.0, 1.0, np.nan], pa.float32())}
    return pa.table({name: values for name, values in {**made, **columns}.items() if values is not None})


def test_by_id_in_the_data_sets_order():
    joined = join(dataset(), scores())
    assert joined.column_names == ["id", "x", "s"]
    assert joined["id"] == ["a", "b", "c"]
    np.testing.assert_array_equal(joined.with_format("numpy")["s"], np.array([1, np.nan, 3], np.float32))
    assert joined.features["s"].dtype == "float32"


def test_shuffled_formatted_and_by_whole_numbers():
    data = datasets.Dataset.from_dict({"key": list(range(100)), "x": [[i] for i in range(100)]})
    data = data.shuffle(seed=0).select(range(50)).with_format("torch")
    table = pa.table({"id": [str(i) for i in range(100)], "s": [float(i) for i in range(100)]})
    joined = join(data, table, "key", surplus="drop")
    assert joined.format["type"] == "torch"
    assert joined["key"][:].tolist() == data["key"][:].tolist() == joined["s"][:].long().tolist()
    assert joined["x"][:].flatten().tolist() == data["key"][:].tolist()
    assert sorted(data["key"][:].tolist()) != data["key"][:].tolist()


def test_by_row():
    joined = join(dataset(), scores(row=pa.array([2, 0, 1])), None)
    np.testing.assert_array_equal(joined.with_format("numpy")["s"], np.array([1, np.nan, 3], np.float32))
    plain = join(dataset(), pa.table({"s": [1.0, 2.0, 3.0], "lists": [[1.0], [], [2.0, 3.0]]}), None)
    assert (plain["s"][:], plain["lists"][:]) == ([1.0, 2.0, 3.0], [[1.0], [], [2.0, 3.0]])


def test_rows_without_a_score_are_null_on_request_alone():
    data = dataset(["a", "b", "c", None, "e"])
    with pytest.raises(ValueError, match=r"2 of the data set's 5 rows have no score, the first is row 3 \(id None\)"):
        join(data, scores())
    assert join(data, scores(), missing="null")["s"][3:] == [None, None]
    with pytest.raises(ValueError, match=r"the first is row 3; .* pass missing='null'"):
        join(data, scores(), None)


def test_a_folder_of_scores(project):
    rows = make_rows(20, 5)
    rows[3]["label"] = None
    project.write_shard("bad.jsonl", rows)
    run(load_recipe(str(project.path)))
    everything = [*make_rows(50, 0), *rows, *make_rows(30, 1)]
    data = datasets.Dataset.from_list(everything)
    by_id = join(data, project.scores, columns=["mimic"], missing="null")
    by_row = join(data, str(project.scores), None, columns=["mimic"], missing="null")
    assert by_id["mimic"][:] == by_row["mimic"][:]
    assert [i for i, score in enumerate(by_id["mimic"]) if score is None] == [53]
    drawn = list(WeightedSampler(by_id, "mimic", temperature=1.0, keep="high"))
    assert drawn == list(WeightedSampler(project.scores, "mimic", temperature=1.0, num_samples=99))
    with pytest.raises(ValueError, match="the scored corpus has 100 rows and the data set 99"):
        join(data.select(range(99)), project.scores, None)
    with pytest.raises(ValueError, match="has no score 'mimc'"):
        join(data, project.scores, columns=["mimc"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((dataset(["a", "b"]), scores()), "1 of 3 scores are of no row of the data set, the first has id 'c'"),
        ((dataset(["a", "b", "a"]), scores()), "id 'a' is in the data set's column 'id' more than once"),
        ((dataset(), scores(id=["a", "b", "b"])), "id 'b' is in the scores more than once"),
        ((dataset(), scores(id=["a", "b", None])), "1 entries of the scores have no id"),
        ((dataset(), scores(id=None)), "the scores have no column 'id'"),
        ((dataset(), scores(), "key"), "on='key': the data set has no such column; it has id, x"),
        ((dataset([1.0, 2.0]), scores()), "holds double per row; expected texts or whole numbers"),
        ((dataset(), scores(x=[1, 2, 3])), "the data set has a column 'x' already"),
        ((dataset(), scores(s=None)), "no column beside row and id"),
        ((dataset(["a", "b"]), scores(), None), "a score of row 2, and the data set has 2 rows"),
        ((dataset(), scores(row=pa.array([0, 0, 1])), None), "row 0 occurs 2 times"),
        ((dataset(), scores(row=None), None), "no column `row`"),
        ((datasets.DatasetDict(train=dataset()), scores()), "type DatasetDict; expected a datasets.Dataset"),
        ((dataset().to_iterable_dataset(), scores()), "type IterableDataset"),
        ((dataset(), {"s": [1.0]}), "scores of type dict"),
    ],
)
def test_what_does_not_match_is_refused(arguments, message):
    with pytest.raises((ValueError, TypeError)) as error:
        join(*arguments)
    assert message in str(error.value)
