"""A corpus's features on disk: one Arrow file per shard, written in one piece, mapped back into memory without a copy.

A file holds `row` (int64), `id` (string), `feature` (a fixed-size list of float32, float16, bfloat16 as uint16, or int8
with a `scale` per row) and perhaps one more float32 per row, in record batches of a fixed number of rows. Its footer is
a score table's, and under `features` says what made them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from assay._json import dumps
from assay.corpus.arrow_numpy import array_of, ids_of, numbers_of
from assay.corpus.errors import CorpusError
from assay.corpus.footer import differences
from assay.corpus.storage import Store, may_pass
from assay.corpus.tables import METADATA_KEY, ROW_AND_ID, read_metadata
from assay.ops.scan import Reduce, merge_topk, topk_scan

# A record batch is about this large, and is what a reader gets as one tensor.
BATCH_BYTES = 64 << 20
MAX_BATCH_ROWS = 1 << 18  # so that the ids of a batch, too, stay far below Arrow's 2 GB

SUFFIX = ".arrow"
_DIFFERENT = {
    "recipe": "features from another recipe",
    "recipe_hash": "features from another recipe",
    "models": "features of other models",
    "input": "features of another input",
    "seed": "features under another seed",
    "features": "features of another kind",
}
_STORED = {
    "float32": (torch.float32, pa.float32()),
    "float16": (torch.float16, pa.float16()),
    "bfloat16": (torch.bfloat16, pa.uint16()),  # Arrow has no bfloat16: its bits
    "int8": (torch.int8, pa.int8()),
}


@dataclass(frozen=True)
class FeatureSpec:
    """What features are: made by which method under which sketch, and stored as what.

    ``dtype`` is ``float32``, ``float16``, ``bfloat16`` or ``int8``; ``sketch`` is plain JSON; ``extra`` names the
    column of one more float32 number per row that scores are made of (TRAK's ``doubt``).
    """

    method: str
    dim: int
    dtype: str = "float16"
    sketch: Mapping[str, Any] = field(default_factory=dict)
    extra: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in _STORED:
            raise ValueError(f"features: unknown dtype {self.dtype!r}; expected one of {', '.join(_STORED)}")
        if isinstance(self.dim, bool) or not isinstance(self.dim, int) or self.dim < 1:
            raise ValueError(f"features: expected a dim of at least 1, got {self.dim!r}")
        if self.extra in ("", "row", "id", "feature", "scale"):
            raise ValueError(f"features: the extra column cannot be called {self.extra!r}; give it a name of its own")

    @property
    def torch_dtype(self) -> torch.dtype:
        return _STORED[self.dtype][0]

    @property
    def batch_rows(self) -> int:
        """Rows of a record batch: they follow from the spec, so that the same features are the same bytes."""
        return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // (self.dim * self.torch_dtype.itemsize)))

    def schema(self, metadata: Mapping[str, Any]) -> pa.Schema:
        """The file's schema, with ``metadata`` as its footer."""
        element = pa.field("item", _STORED[self.dtype][1], nullable=False)
        columns = [*ROW_AND_ID, pa.field("feature", pa.list_(element, self.dim), nullable=False)]
        if self.dtype == "int8":
            columns.append(pa.field("scale", pa.float32(), nullable=False))
        if self.extra is not None:
            columns.append(pa.field(self.extra, pa.float32(), nullable=False))
        footer = dumps(metadata, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return pa.schema(columns, metadata={METADATA_KEY: footer.encode()})


def quantize(features: Tensor) -> tuple[Tensor, Tensor]:
    """(B, d) -> int8 (B, d) and scales (B,) float32, max|x| / 127 of each row: features ≈ scales · int8.

    A row of zeros has scale 0. A row with a NaN or an infinity has scale NaN, and so has every score of it.
    """
    wide = features.float()
    scales = wide.abs().amax(1) / 127
    scales = scales.masked_fill(~scales.isfinite(), torch.nan)
    steps = torch.where(scales[:, None] > 0, wide / scales[:, None], 0)  # 0 where the scale is NaN, too
    return steps.round().clamp(-127, 127).to(torch.int8), scales


class FeatureWriter:
    """Collects a shard's features in ``spool``, in row order, and writes the file at the end.

    The spool is a nameless temporary file, as it is for a ``ScoreWriter``: the footer's facts are known only after the
    last row, and a killed run leaves nothing behind.
    """

    def __init__(self, spec: FeatureSpec, spool: IO[bytes]) -> None:
        self.rows = 0
        self._spec = spec
        self._schema = spec.schema({})
        self._spool = spool
        self._stream = pa.ipc.new_stream(spool, self._schema)
        self._held: list[pa.RecordBatch] = []

    def add(
        self, rows: npt.ArrayLike, ids: Sequence[str] | pa.Array, features: Tensor, extra: Tensor | None = None
    ) -> FeatureBatch:
        """Append (B, dim) floats, their rows in the source and their ids; with an extra column, (B,) floats for it.

        Returns:
            The rows as a reader will find them: rounded.

        Raises:
            ValueError: the arguments do not fit together, or a finite feature would overflow the stored dtype.
        """
        row_array = np.asarray(rows, dtype=np.int64)
        count, spec = len(row_array), self._spec
        if not features.is_floating_point() or features.shape != (count, spec.dim) or len(ids) != count:
            raise ValueError(
                f"features: expected a float tensor ({count}, {spec.dim}) and as many ids for {count} rows, "
                f"got {features.dtype} {tuple(features.shape)} and {len(ids)} ids"
            )
        if (extra is None) != (spec.extra is None) or (extra is not None and extra.shape != (count,)):
            found = "none" if extra is None else str(tuple(extra.shape))
            raise ValueError(
                f"features: expected {'no' if spec.extra is None else f'({count},)'} extra numbers, got {found}"
            )
        stored, scales = self._convert(features.detach().cpu())
        column = pa.FixedSizeListArray.from_arrays(array_of(_bits(stored).reshape(-1)), type=self._schema.field(2).type)
        columns = [array_of(row_array), ids_of(ids), column]
        extra = None if extra is None else extra.detach().cpu().float()
        columns += [array_of(t.numpy()) for t in (scales, extra) if t is not None]
        self._held.append(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self.rows += count
        if sum(batch.num_rows for batch in self._held) >= spec.batch_rows:
            self._flush(last=False)
        return FeatureBatch(stored, scales, row_array, columns[1], extra)

    def save(self, store: Store, path: str, metadata: Mapping[str, Any]) -> None:
        """Write the file under its final name, with ``metadata`` and what the features are in its footer.

        A CorpusError if there is a file of that name that holds no features: it may be somebody's corpus.
        """
        open_features(store, path)
        self._flush(last=True)
        self._stream.close()
        self._spool.seek(0)
        schema = self._spec.schema({**metadata, "features": asdict(self._spec) | {"rows": self.rows}})
        with store.write(path) as file, pa.ipc.new_file(file, schema) as writer:
            for batch in pa.ipc.open_stream(self._spool):
                writer.write_batch(batch.replace_schema_metadata(schema.metadata))

    def _convert(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._spec.dtype == "int8":
            return quantize(features)
        stored = features.to(self._spec.torch_dtype).contiguous()
        if bool((stored.isinf() & features.isfinite()).any()):
            raise ValueError(
                f"features: values up to {features.abs().nan_to_num(0, 0, 0).max():.3g} overflow {self._spec.dtype}; "
                f"store them as bfloat16 or float32, or scale them"
            )
        return stored, None

    def _flush(self, last: bool) -> None:
        """Write what is held in batches of a fixed length; a shorter rest waits for more unless it is the last."""
        table = pa.Table.from_batches(self._held, self._schema).combine_chunks()
        size = self._spec.batch_rows
        whole = table.num_rows if last else table.num_rows // size * size
        for batch in table.slice(0, whole).to_batches(max_chunksize=size):
            # Arrow writes a slice of strings with the bytes that follow it, up to its padding; a copy has none.
            ids = batch.column("id").take(array_of(np.arange(batch.num_rows)))
            self._stream.write_batch(batch.set_column(1, self._schema.field("id"), ids))
        self._held = table.slice(whole).to_batches()


@dataclass(frozen=True)
class FeatureBatch:
    """Consecutive rows of a file. The tensors may lie in a file mapped read-only: writing to them ends the process."""

    features: Tensor  #: (B, d), in the dtype that is stored
    scales: Tensor | None  #: (B,) float32 of int8 features
    rows: npt.NDArray[np.int64]  #: (B,), in the source
    ids: pa.StringArray
    extra: Tensor | None = None  #: (B,) float32 of the extra column

    def __getitem__(self, part: slice) -> FeatureBatch:
        """Some of the rows, not copied."""
        scales, extra = (None if t is None else t[part] for t in (self.scales, self.extra))
        return FeatureBatch(self.features[part], scales, self.rows[part], self.ids[part], extra)

    def values(self) -> Tensor:
        """(B, d) floats: the features themselves, or what int8 ones stand for, in float32."""
        return self.features if self.scales is None else self.features * self.scales[:, None]


@dataclass(frozen=True)
class FeatureFile:
    """A shard's features as far as its footer tells."""

    store: Store
    path: str
    spec: FeatureSpec
    rows: int
    metadata: Mapping[str, Any]

    @property
    def shard(self) -> str:
        """The shard that these are the features of, as its footer names it, else by the file's own path."""
        source = self.metadata.get("input")
        return str(source["path"]) if isinstance(source, Mapping) and "path" in source else self.path

    def differences(self, expect: Mapping[str, Any]) -> list[str]:
        """What of ``expect``, as ``open_features`` takes it, the footer does not hold; empty if it holds it all."""
        return list(_differences(self.metadata, expect))

    def batches(self) -> Iterator[FeatureBatch]:
        """All rows in order; local files are mapped, not read. A CorpusError if the file is not what it says."""
        seen = 0
        where = self.store.full(self.path)
        with _readable(self.store, self.path) as reader:
            for i in range(reader.num_record_batches):
                batch = _unpack(reader.get_batch(i), self.spec, where)
                seen += len(batch.rows)
                yield batch
        if seen != self.rows:
            raise CorpusError(f"{where}: holds {seen} rows where its footer says {self.rows}; delete it to remake it")


def open_features(store: Store, path: str, expect: Mapping[str, Any] | None = None) -> FeatureFile | None:
    """What a shard's features say about themselves; None if there are none.

    Args:
        expect: what the footer must hold, any part of it: ``{"recipe_hash": …, "input": {"size": …}}``.

    Raises:
        CorpusError: the file holds no features, or others than expected: it names the first difference.
    """
    if not store.exists(path):
        return None
    where = store.full(path)
    with _readable(store, path) as reader:
        schema = reader.schema
    try:
        metadata = read_metadata(schema)
        facts = dict(metadata["features"])
        rows = facts.pop("rows")
        spec = FeatureSpec(**facts)
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{where}: not a feature file: no `features` in its footer; move it away") from error
    wanted = spec.schema({})
    if not isinstance(rows, int) or not schema.equals(wanted, check_metadata=False):
        raise CorpusError(
            f"{where}: its columns are not those of its footer, {', '.join(map(str, wanted))}; move it away"
        )
    _check_footer(where, metadata, expect or {})
    return FeatureFile(store, path, spec, rows, metadata)


class Place(NamedTuple):
    """Where a row of a ``FeatureStore`` comes from."""

    shard: str
    row: int
    id: str


class FeatureStore:
    """The features of a corpus: every feature file under ``root``, in the order of their paths.

    Args:
        root: a local path or an fsspec URL.
        expect: what every footer must hold, as in ``open_features``.

    Attributes:
        files: a ``FeatureFile`` for each shard.
        rows, dim, dtype: rows of all files, features per row, and the dtype they are stored in.

    Raises:
        CorpusError: there are none, one is foreign or unexpected, or two are not of the same making.
    """

    def __init__(self, root: str, expect: Mapping[str, Any] | None = None) -> None:
        store = Store.at(root)
        files: list[FeatureFile] = []
        for path in store.files():
            if path.endswith(SUFFIX) and not any(part.startswith((".", "_")) for part in path.split("/")):
                file = open_features(store, path, expect)
                if file is None:
                    raise CorpusError(f"{store.full(path)}: disappeared while the folder was read")
                if files:
                    _check_same_making(files[0], file)
                files.append(file)
        if not files:
            raise CorpusError(f"{root}: no features found; expected files ending in {SUFFIX}")
        self.files = tuple(files)
        self.spec = files[0].spec
        self.rows = sum(file.rows for file in files)
        self.dim = self.spec.dim
        self.dtype = self.spec.torch_dtype
        self._mapped: dict[str, tuple[FeatureBatch, ...]] = {}

    def batches(self) -> Iterator[FeatureBatch]:
        """All rows, as they are stored. Local files stay mapped, so that only the first read pays for it."""
        for file in self.files:
            if not file.store.is_local:
                yield from file.batches()
                continue
            if file.path not in self._mapped:
                self._mapped[file.path] = tuple(file.batches())
            yield from self._mapped[file.path]

    def __iter__(self) -> Iterator[tuple[Tensor, npt.NDArray[np.int64], pa.StringArray]]:
        """(B, d) floats, rows in the source and ids, batch after batch."""
        for batch in self.batches():
            yield batch.values(), batch.rows, batch.ids

    def topk(self, queries: Tensor, k: int, reduce: Reduce = "mean") -> tuple[Tensor, Tensor]:
        """``ops.topk_scan`` over all files: values and indices, counted through the files in order (see ``locate``)."""
        if k > self.rows:
            raise ValueError(f"k: expected at most the store's rows, {self.rows}, got k = {k}")
        values, indices = topk_scan(torch.empty(0, self.dim), queries, 0, reduce=reduce)
        if reduce == "mean":  # once, not for every batch
            queries = queries.double().mean(0, keepdim=True).to(values.dtype)
        start = 0
        for batch in self.batches():
            count = len(batch.rows)
            best = topk_scan(batch.features, queries, min(k, count), reduce=reduce, scales=batch.scales)
            candidates = torch.cat([values, best[0]], -1), torch.cat([indices, best[1] + start], -1)
            values, indices = merge_topk(*candidates, k)
            start += count
        return values, indices

    def locate(self, indices: Tensor | Sequence[int]) -> list[Place]:
        """Where rows come from, given as ``topk`` counts them: one place for each index."""
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < self.rows:
            raise IndexError(f"indices: expected them in [0, {self.rows}), got {wanted.min()} to {wanted.max()}")
        places: dict[int, Place] = {}
        start = 0
        for file in self.files:
            here = np.unique(wanted[(wanted >= start) & (wanted < start + file.rows)])
            if len(here):
                places.update(_places(file, here, start))
            start += file.rows
        return [places[i] for i in wanted.tolist()]


def _places(file: FeatureFile, indices: npt.NDArray[np.int64], start: int) -> Iterator[tuple[int, Place]]:
    for batch in file.batches():
        end = start + len(batch.rows)
        for i in indices[(indices >= start) & (indices < end)].tolist():
            yield i, Place(file.shard, int(batch.rows[i - start]), batch.ids[i - start].as_py())
        start = end


def _bits(stored: Tensor) -> npt.NDArray[Any]:
    """The numbers as Arrow holds them."""
    return stored.view(torch.uint16).numpy() if stored.dtype == torch.bfloat16 else stored.numpy()


@contextlib.contextmanager
def _readable(store: Store, path: str) -> Iterator[pa.ipc.RecordBatchFileReader]:
    """A file's reader. What is wrong with the file is a CorpusError; what it maps outlives the block."""
    try:
        # Opened first by itself: to map a pipe would wait for its writer.
        with store.open(path) as file, pa.memory_map(store.full(path)) if store.is_local else file as source:
            yield pa.ipc.open_file(source)
    except (pa.ArrowException, OSError) as error:
        if may_pass(error):
            raise
        detail = " ".join(str(error).split())
        raise CorpusError(f"{store.full(path)}: not a readable feature file ({detail}); move it away") from error


def _unpack(batch: pa.RecordBatch, spec: FeatureSpec, where: str) -> FeatureBatch:
    """A batch as tensors, which native code will trust: sizes, nulls and text are checked here."""
    batch.validate()
    ids = batch.column("id")
    ids.validate(full=True)
    lists = batch.column("feature")
    numbers = lists.flatten()
    if len(numbers) != batch.num_rows * spec.dim or any(c.null_count for c in (*batch.columns, numbers)):
        raise CorpusError(f"{where}: has nulls; features never do. Move it away")
    features = _tensor(numbers)
    if spec.dtype == "bfloat16":
        features = features.view(torch.bfloat16)
    scales = _tensor(batch.column("scale")) if spec.dtype == "int8" else None
    extra = None if spec.extra is None else _tensor(batch.column(spec.extra))
    return FeatureBatch(features.reshape(-1, spec.dim), scales, numbers_of(batch.column("row")), ids, extra)


def _tensor(numbers: pa.Array) -> Tensor:
    """The same memory, which the tensor keeps alive. DLPack, for torch.from_numpy warns of read-only arrays."""
    tensor: Tensor = torch.utils.dlpack.from_dlpack(numbers)
    return tensor


def _differences(metadata: Mapping[str, Any], expect: Mapping[str, Any]) -> Iterator[str]:
    """What a footer lacks of what is expected, as ``features of … (key is …, expected …)``."""
    for key, value in json.loads(dumps(expect)).items():
        for difference in differences(metadata.get(key), value, key, extra=False):
            yield f"{_DIFFERENT.get(key, 'features of another run')} ({difference})"


def _check_footer(where: str, metadata: Mapping[str, Any], expect: Mapping[str, Any]) -> None:
    for difference in _differences(metadata, expect):
        raise CorpusError(f"{where}: {difference}; delete them to remake them, or use another folder")


def _check_same_making(first: FeatureFile, file: FeatureFile) -> None:
    made_by = {key: first.metadata.get(key) for key in ("recipe", "recipe_hash", "models", "seed")}
    where = f"{file.store.full(file.path)}, beside {first.path}"
    _check_footer(where, file.metadata, {"features": asdict(first.spec), **made_by})
