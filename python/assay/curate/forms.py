"""What a selection may be written as: curated shards, rows' indices, ids with weights, or a folder for `datasets`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from assay.corpus.copying import copy_named_files, copy_rows
from assay.corpus.errors import CorpusError
from assay.corpus.layout import table_path
from assay.corpus.named_files import files_then
from assay.corpus.score_files import regroup
from assay.corpus.shards import Shard
from assay.corpus.storage import Store
from assay.curate.chosen import BLOCK_ROWS, Ids, ShardSelection
from assay.select import Selection

DATA = "data/"
REPEAT = "repeat-"
CARD = "README.md"
CARD_TEXT = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/**
---
The rows of a corpus that `assay select` has kept; `manifest.json` says by which rule and from what.
"""
# Suffixes that `datasets` has a loader for, by the loader and its settings: one folder is loaded by one.
_LOADERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv with tabs",
    ".tar": "webdataset",
}
_COMPRESSED = ("json", "csv", "csv with tabs")


@dataclass(frozen=True)
class Form:
    """A way to write a selection.

    Attributes:
        prefix: of the paths of a shard's files, in the output.
        files: the files that a shard is written as.
        write: writes a shard's rows and gives the path of the file that holds them; None of a copied shard.
        check: a CorpusError for a selection that cannot be written so, before anything is.
        has_sidecars: whether a saved data set stays one.
        has_named_files: whether the files that rows name lie beside them.
        texts: by path, what is written beside the shards.
    """

    name: str
    files: Callable[[Shard], Sequence[str]]
    write: Callable[[Store, ShardSelection, Store], str | None]
    check: Callable[[Selection, Sequence[Shard]], None]
    prefix: str = ""
    has_sidecars: bool = False
    has_named_files: bool = False
    texts: Mapping[str, str] = field(default_factory=dict)


def find_form(name: str) -> Form:
    """The form of this name. CorpusError if there is none."""
    if name not in FORMS:
        raise CorpusError(f"--format {name}: expected {', '.join(FORMS)}")
    return FORMS[name]


# ---- shards


def _copy(store: Store, chosen: ShardSelection, output: Store) -> None:
    """The rows, and the files that they name. Rows that are to be there twice, three times and so on are in further
    shards, in a folder for each time."""
    files = files_then(store, chosen.shard) if chosen.image_column is not None else ()
    for times in range(1, 1 + max(1, int(chosen.copies.max(initial=0)) if chosen.copies is not None else 1)):
        target = output if times == 1 else Store(output.fs, output.full(f"{REPEAT}{times}"))
        copy_rows(chosen.shard, chosen.keep(times), target)
        if chosen.image_column is not None:
            copy_named_files(chosen.shard, chosen.image_column, files, chosen.keep(times), target)


def check_repeats(selection: Selection, shards: Sequence[Shard], form: Form, is_saved_data_set: bool) -> None:
    """CorpusError for rows that are to be there more than once, where a form has no place for them."""
    if selection.copies is None or form.name not in ("shards", "datasets") or not (selection.copies > 1).any():
        return
    advice = "take rates of at most 1, or --format indices"
    if is_saved_data_set and form.has_sidecars:
        raise CorpusError(f"--mix: a saved data set has no place for rows that are there more than once; {advice}")
    for shard in shards:
        if shard.is_folder:
            raise CorpusError(f"--mix: {shard.path}: a folder has no place for rows that are there twice; {advice}")
        if is_repeat(shard.path):
            raise CorpusError(f"--mix: {shard.path}: lies where rows would go that are there twice; {advice}")


def check_named_files(shards: Sequence[ShardSelection], form: Form) -> None:
    """CorpusError for rows that name files, where a form has no place for these."""
    for chosen in shards:
        where, column = f"--format {form.name}: {chosen.shard.path}", chosen.image_column
        if column is not None and form.name == "datasets":
            raise CorpusError(f"{where}: its rows name files, which `datasets` would take for data; take shards")
        if column == "" and form.has_named_files:
            raise CorpusError(f"{where}: its rows name files, and no recipe says in which column; take indices")


def is_repeat(path: str) -> bool:
    """Whether a file of a selection, without its form's prefix, lies where rows are that are there more than once."""
    return re.match(rf"{REPEAT}\d+/", path) is not None


def _check_nothing(selection: Selection, shards: Sequence[Shard]) -> None:
    """Any selection can be written so."""


# ---- indices


def _indices_path(shard: Shard) -> str:
    return f"indices/{table_path(shard)}"


def _write_indices(store: Store, chosen: ShardSelection, output: Store) -> str:
    """`shard`, `row` in it and `index` over all shards, of every row that is kept, as often as it is to be there."""
    schema = pa.schema([("shard", pa.string()), ("row", pa.int64()), ("index", pa.int64())])
    times = chosen.times()

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, chosen.total, BLOCK_ROWS):
            here = times[start : start + BLOCK_ROWS]
            rows = np.repeat(np.arange(start, start + len(here)), here)
            index = pa.nulls(len(rows), pa.int64()) if chosen.first is None else pa.array(rows + chosen.first)
            columns = [pa.repeat(chosen.shard.path, len(rows)), pa.array(rows), index]
            yield pa.RecordBatch.from_arrays(columns, schema=schema)

    return _write(batches(), schema, _indices_path(chosen.shard), output)


# ---- weights


def _weights_path(shard: Shard) -> str:
    return f"weights/{table_path(shard)}"


def _write_weights(store: Store, chosen: ShardSelection, output: Store) -> str:
    """`id` and `weight` of every row that is kept; over all shards the weights' mean is 1."""
    weight = pa.field("weight", pa.float32(), metadata={"keep": "high", "description": "mean 1 over the selection"})
    schema = pa.schema([pa.field("id", pa.string()), weight])
    weights, kept, ids = chosen.weights, chosen.kept, Ids(store, table_path(chosen.shard))
    assert weights is not None

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(kept), BLOCK_ROWS):
            here = kept[start : start + BLOCK_ROWS]
            own = (weights[start : start + BLOCK_ROWS][here] * chosen.weight_scale).astype(np.float32)
            columns = [ids.take(len(here)).filter(pa.array(here)), pa.array(own, from_pandas=False)]
            yield pa.RecordBatch.from_arrays(columns, schema=schema)

    return _write(batches(), schema, _weights_path(chosen.shard), output)


def _check_weights(selection: Selection, shards: Sequence[Shard]) -> None:
    if selection.weights is None:
        raise CorpusError(
            "--format weights: the rule weighs all rows that it keeps alike; add --temperature (softmax of the score), "
            "or take --gmm"
        )
    if selection.mask.any() and not selection.weights[selection.mask].sum() > 0:
        raise CorpusError("--format weights: the weights of the kept rows sum to 0; expected some above it")


# ---- datasets


def _data_files(shard: Shard) -> list[str]:
    return [DATA + path for path in shard.files()]


def _write_data(store: Store, chosen: ShardSelection, output: Store) -> None:
    """The shard under data/, unless it has no rows left: loaders stumble over empty files."""
    if chosen.kept.any() or chosen.shard.is_folder:
        _copy(store, chosen, Store(output.fs, output.full(DATA.rstrip("/"))))
    else:
        output.remove(DATA + chosen.shard.path)


def _check_data(selection: Selection, shards: Sequence[Shard]) -> None:
    if not selection.mask.any():
        raise CorpusError("--format datasets: no row is kept; expected at least one")
    loaders = {shard.path: _loader(shard) for shard in shards}
    first = shards[0].path
    for path, loader in loaders.items():
        if loader is None:
            raise CorpusError(f"--format datasets: {path}: `datasets` has no loader for it; take --format indices")
        if loader != loaders[first]:
            raise CorpusError(
                f"--format datasets: {first} is loaded as {loaders[first]} and {path} as {loader}; expected shards of "
                "one format; take --format indices"
            )


def _loader(shard: Shard) -> str | None:
    if shard.is_folder:
        return "imagefolder" if shard.format.name == "images" else None
    suffix = shard.path[len(shard.stem) :]
    loader = _LOADERS.get(f".{suffix.split('.')[1]}")
    return loader if shard.compression is None or loader in _COMPRESSED else None


def _write(batches: Iterable[pa.RecordBatch], schema: pa.Schema, path: str, output: Store) -> str:
    with (
        output.write(path) as file,
        pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=["shard"]) as writer,
    ):
        for table in regroup(batches, schema, BLOCK_ROWS):  # a group of the few rows of a block would be small
            writer.write_table(table)
    return path


FORMS = {
    form.name: form
    for form in (
        Form("shards", Shard.files, _copy, _check_nothing, has_sidecars=True, has_named_files=True),
        Form("indices", lambda shard: [_indices_path(shard)], _write_indices, _check_nothing),
        Form("weights", lambda shard: [_weights_path(shard)], _write_weights, _check_weights),
        Form("datasets", _data_files, _write_data, _check_data, DATA, texts={CARD: CARD_TEXT}),
    )
}
