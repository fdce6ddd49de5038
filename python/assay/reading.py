"""``assay.read``: a scores folder for people's own tables and queries."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from assay._lazy import require

if TYPE_CHECKING:
    import pyarrow.dataset as pads


def read(
    scores: str | os.PathLike[str], corpus: str | os.PathLike[str] | None = None, *, partial: bool = False
) -> pads.Dataset:
    """The scores of a folder of `assay score`, as a data set of Arrow that pyarrow, DuckDB and polars can query.

    Opening it reads the manifest and the tables' footers, and no row. It has the columns

    - ``shard``, the path of the row's shard in the corpus, and ``row``, its physical row there, by which scores are
      joined with the corpus and with each other,
    - ``id``, and every score: float32, or lists of float32 where it is several numbers per sample. Its field's metadata
      says which end to ``keep``. A score that is not a number is NaN and never null: NumPy's and Arrow's aggregates let
      it spread, and DuckDB sorts it above every number.

    Rows that were quarantined have no scores and are not in it.

    Args:
        scores: a path, or any fsspec URL.
        corpus: where the corpus is now, if it has moved since it was scored.
        partial: read the shards that are done, and name the others in the log of `assay` as warnings. Without it
            shards that have no table, have changed since they were scored, or could not be read are an error.

    Raises:
        ValueError: this is no scores folder; no shard is done; or, without ``partial``, one is not.
    """
    require("fsspec", "cli")
    from assay.curate.dataset import open_dataset

    return open_dataset(os.fspath(scores), None if corpus is None else os.fspath(corpus), partial)
