"""A recipe as a function of Arrow tables, for pipelines of one's own."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from assay.corpus.errors import ShardError
from assay.corpus.footer import Tally
from assay.corpus.shards import Corpus, find_shards
from assay.corpus.storage import Store
from assay.corpus.tables import ROW_AND_ID, score_schema
from assay.engine.columns import with_columns
from assay.engine.devices import find_devices
from assay.engine.plan import Plan, identity_of
from assay.engine.shard import Scored, score_windows
from assay.engine.workshop import open_workshop
from assay.recipe.errors import EngineError
from assay.recipe.recipe import Recipe, load_recipe

FAULT = "assay_fault"
"""The column that says why a row has no scores; null where it has."""


class Scorer:
    """Table in, the same table with its scores out: rows stay where they are, and every one of them comes back.

    For Ray, whose actors load the models once::

        ray.data.read_parquet("corpus/").map_batches(
            assay.ray.Scorer,
            fn_constructor_args=("recipe.yaml",),
            batch_format="pyarrow",
            batch_size=1024,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=8),
            num_gpus=1,
        )

    and alike for ``Dataset.with_format("arrow").map(scorer, batched=True)`` of Hugging Face, or a loop. One that is
    sent to another process is made there anew. A sample's scores are those of ``assay score``, but for the rounding of
    products of so many rows. Ids are told apart within a table only.

    Args:
        recipe: its file, or a recipe. Its corpus tells what the columns are, and is not scored; its output is not used.
        overrides: as of ``--set``.
        trust: as of ``--trust``.
        device: one of ``run.devices``; None: a GPU if there is one, else the CPU.

    Raises:
        EngineError: as ``assay score``; or samples whose scores hang together, by which rows are near them, or features
            to be kept.
    """

    def __init__(
        self,
        recipe: str | Recipe,
        overrides: Sequence[str] = (),
        trust: Sequence[str] = (),
        device: str | None = None,
    ) -> None:
        loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides, trust)
        if loaded.shortlist is not None:
            raise EngineError(
                "assay.ray.Scorer: a shortlist is chosen among a corpus's rows, and this sees a table; leave it out"
            )
        self._made_of = (loaded.model_dump(), (*trust, *loaded.trust), device)
        self._lock = threading.Lock()  # the models' hooks serve one call at a time
        self._workshop = open_workshop(_plan(loaded), device=find_devices("auto" if device is None else device)[0])
        if loaded.task.group_rows is not None:
            raise EngineError(
                "assay.ray.Scorer: the task compares samples in groups, which follow from the rows of a shard; a "
                "table's would be others. Score the corpus with `assay score`"
            )
        if self._workshop.feature_methods:
            raise EngineError("assay.ray.Scorer: keep_features writes files per shard; leave it out")

    def __reduce__(self) -> Any:
        return _made, self._made_of

    def __call__(self, table: pa.Table) -> pa.Table:
        """The table with a float32 column per score, NaN in rows without, and ``assay_fault``, string.

        Raises:
            EngineError: a column is missing or there already, or a model or a method failed.
        """
        columns = self._workshop.columns
        added = [column.name for column in columns] + [FAULT]
        if taken := [name for name in added if name in table.column_names]:
            raise EngineError(f"the table has a column {taken[0]!r} already; expected one without the scores to come")
        scored = self._score(table) if table.num_rows else []
        faults: npt.NDArray[np.object_] = np.full(table.num_rows, None, object)
        for bad in (bad for window in scored for bad in window.rejected):
            faults[bad.row] = bad.reason
        places = np.concatenate([np.empty(0, np.int64), *(window.rows for window in scored)]).astype(np.int64)
        if len(places) + sum(fault is not None for fault in faults) != table.num_rows:
            raise EngineError(f"{table.num_rows} rows in, {len(places)} scored; please report this as a bug in assay")
        for field in list(score_schema(columns, {}))[len(ROW_AND_ID) :]:
            values = [window.scores[field.name] for window in scored]
            table = table.append_column(field, _at(places, values, table.num_rows, field))
        return table.append_column(FAULT, pa.array(faults, pa.string()))

    def _score(self, table: pa.Table) -> list[Scored]:
        """As a shard that lives in memory: its values, types and faults are those of an Arrow file."""
        workshop, scored = self._workshop, list[Scored]()
        assert workshop.scorer is not None
        store = Store.at(f"memory://assay-{uuid.uuid4().hex}")
        try:
            with store.fs.open(store.full("table.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            (shard,) = find_shards(store.url).shards
            with self._lock:
                score_windows(workshop, workshop.scorer.fresh(), shard, scored.append)
        except ShardError as error:
            raise EngineError(f"the table {error}") from error
        finally:
            store.fs.rm(store.root, recursive=True)
        return scored


def _plan(recipe: Recipe) -> Plan:
    """Of a run that has nothing to do."""
    corpora = {path: find_shards(path) for path in (recipe.corpus.path, *recipe.fitted_to().values())}
    recipe, nowhere = with_columns(recipe, corpora), Store.at("memory://assay-nowhere")
    none = Corpus(Store.at(recipe.corpus.path), ())
    return Plan(recipe, identity_of(recipe, corpora), none, corpora, nowhere, Tally(), (), ())


def _made(recipe: Mapping[str, Any], trust: Sequence[str], device: str | None) -> Scorer:
    return Scorer(Recipe.model_validate(recipe, context={"base": "/", "trust": trust}), (), trust, device)


def _at(places: npt.NDArray[np.int64], parts: Sequence[npt.NDArray[Any]], rows: int, field: pa.Field) -> pa.Array:
    """Each value at its row; NaN, or null of several numbers, elsewhere."""
    if pa.types.is_floating(field.type):
        values = np.full(rows, np.nan, np.float32)
        if parts:
            values[places] = np.concatenate(parts)
        return pa.array(values, from_pandas=False)
    lists: npt.NDArray[np.object_] = np.full(rows, None, object)
    for place, value in zip(places, (row for part in parts for row in part), strict=True):
        lists[place] = np.asarray(value)
    return pa.array(lists.tolist(), field.type)
