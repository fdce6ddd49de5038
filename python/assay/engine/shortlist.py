"""The rows that a method scores where it scores few: who chose them, and which they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from assay.corpus.footer import TableColumn
from assay.corpus.shards import Shard
from assay.corpus.storage import Store
from assay.recipe.methods import ShortlistSpec
from assay.recipe.parts import nearest

Rows = npt.NDArray[np.int64]
_NONE: Rows = np.empty(0, np.int64)


@dataclass(frozen=True)
class Shortlist:
    """Rows of a corpus, chosen by scores that every row has.

    Attributes:
        retrieval: the URL of the scores folder with these scores.
        spec: what it was chosen by.
        columns: of the tables there.
        rows: by the shard's path, ascending; shards without any are not named.
    """

    retrieval: str
    spec: ShortlistSpec
    columns: Sequence[TableColumn]
    rows: Mapping[str, Rows]

    @property
    def store(self) -> Store:
        """Where the scores are that chose."""
        return Store.at(self.retrieval)

    def of(self, shard: Shard) -> Rows:
        """The shard's rows in it."""
        return self.rows.get(shard.path, _NONE)

    def __len__(self) -> int:
        return sum(map(len, self.rows.values()))

    def fingerprint(self) -> str:
        """Changes with any row in it."""
        digest = hashlib.sha256()
        for path, rows in sorted(self.rows.items()):
            digest.update(f"{path}\0{len(rows)}\0".encode() + rows.astype("<i8").tobytes())
        return f"sha256:{digest.hexdigest()}"


def ranking_column(spec: ShortlistSpec, columns: Sequence[TableColumn]) -> TableColumn:
    """The column that a shortlist is made by. RecipeError if there is none that can be."""
    known = {column.name: column for column in columns}
    if spec.by not in known:
        hint = nearest(spec.by, known)
        raise spec.wrong(f"no method without a shortlist gives a score {spec.by!r}; {hint}")
    column = known[spec.by]
    if column.width != 1 or column.keep == "none":
        what = "says of neither end that it is better" if column.width == 1 else "is not one number per row"
        fitting = [name for name, each in known.items() if each.width == 1 and each.keep != "none"]
        raise spec.wrong(f"{spec.by} {what}; expected one of {', '.join(fitting) or 'none here'}")
    return column
