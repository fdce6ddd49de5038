"""What a file of scores or features says about its making, and whether that still holds."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from assay._json import dumps
from assay._version import __version__
from assay.corpus.errors import CorpusError
from assay.corpus.layout import table_path
from assay.corpus.named_files import FileFacts
from assay.corpus.quarantine import list_digest
from assay.corpus.score_files import ScoreFile, open_score_file
from assay.corpus.shards import Shard
from assay.corpus.storage import Fingerprint, Store
from assay.corpus.tables import ROW_AND_ID

SHORTLIST = "shortlist"
"""Among the corpora: the rows that a method with a shortlist has scored."""


class _Record(BaseModel):
    # Later versions may add facts; this one must still be able to read what it knows.
    model_config = ConfigDict(frozen=True, extra="ignore")


class InputFacts(_Record):
    """The shard as it was when it was scored."""

    path: str
    size: int
    mtime_ns: int | None = None
    etag: str | None = None
    rows: int
    files: FileFacts | None = None

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.size, self.mtime_ns, self.etag)


class RowCounts(_Record):
    """Every row of the shard is in one of the two."""

    scored: int
    quarantined: int


class Identity(_Record):
    """What decides the scores of a given input: the recipe's scoring part, the models' contents, and the fingerprints
    of the corpora that methods are fitted to (``targets.<name>`` and ``fit``) or score alone (``shortlist``)."""

    recipe: dict[str, Any]
    models: dict[str, str]
    corpora: dict[str, str] | None = None


class TableColumn(_Record):
    """A score of every table, as `assay.methods.Column` has it."""

    name: str
    keep: str = "none"
    description: str = ""
    width: Annotated[int, Field(ge=1, lt=1 << 31)] | None = 1


def columns_in(schema: pa.Schema) -> list[TableColumn]:
    """The scores of a table, by its schema: the inverse of `tables.score_schema`."""
    return [_column(own) for own in list(schema)[len(ROW_AND_ID) :]]


def _column(own: pa.Field) -> TableColumn:
    said, is_fixed = own.metadata or {}, pa.types.is_fixed_size_list(own.type)
    keep, description = said.get(b"keep", b"none").decode(), said.get(b"description", b"").decode()
    width = 1 if pa.types.is_floating(own.type) else own.type.list_size if is_fixed else None
    return TableColumn(name=own.name, keep=keep, description=description, width=width)


class Manifest(Identity):
    """What a scores folder says about all of its tables."""

    corpus: str
    columns: list[TableColumn]
    inputs: list[str] = []
    """The paths of all corpora that the scores depend on."""


class Footer(_Record):
    """The JSON under the key `assay`. It holds no time and no place: the same run, the same bytes."""

    format: int = 1
    version: str
    input: InputFacts
    recipe: dict[str, Any]
    recipe_hash: str
    models: dict[str, str]
    corpora: dict[str, str] | None = None
    seed: int
    rows: RowCounts
    quarantine: str | None = None
    """The digest of the list of quarantined rows, which are what the table does not hold; None without such a list."""
    nan: dict[str, int]
    methods: dict[str, str]

    @classmethod
    def make(
        cls,
        identity: Identity,
        input: InputFacts,
        rows: RowCounts,
        quarantine: str | None,
        nan: Mapping[str, int],
        methods: Mapping[str, str],
    ) -> Footer:
        """The footer of a table scored under ``identity``, beside its ``quarantine`` list."""
        return cls(
            version=__version__,
            input=input,
            recipe=identity.recipe,
            recipe_hash=canonical_hash(identity.recipe),
            models=identity.models,
            corpora=identity.corpora,
            seed=identity.recipe["seed"],
            rows=rows,
            quarantine=quarantine,
            nan=dict(nan),
            methods=dict(methods),
        )

    def to_json(self) -> dict[str, Any]:
        """The footer without what the file system did not know."""
        return self.model_dump(exclude_none=True) | {"recipe": self.recipe}


@dataclass
class Tally:
    """What became of the rows of some shards."""

    shards: int = 0
    rows: int = 0
    rows_scored: int = 0
    rows_quarantined: int = 0
    nan: Counter[str] = field(default_factory=Counter)
    warnings: dict[str, str] = field(default_factory=dict)

    def add(self, footer: Footer) -> None:
        """Count one table."""
        self.shards += 1
        self.rows += footer.input.rows
        self.rows_scored += footer.rows.scored
        self.rows_quarantined += footer.rows.quarantined
        self.nan.update(footer.nan)
        self.warnings |= {
            key: text for key, text in footer.methods.items() if key.endswith((".warning", ".left_out_layers"))
        }


@dataclass(frozen=True)
class Table:
    """A score table that exists."""

    file: ScoreFile
    footer: Footer

    def input_is(self, shard: Shard, found: Fingerprint) -> bool:
        """Whether the shard, which was ``found`` so, is still the one that was scored. One that has another suffix now
        would have the same table: its format may be another one, and without a column of ids its ids are."""
        then = self.footer.input
        return then.path == shard.path and then.fingerprint == found

    def list_is_there(self, store: Store, shard: Shard) -> bool:
        """Whether the list of the rows that it lacks is the one that was written with it: a run may have been killed
        between another list and its table."""
        return not self.footer.rows.quarantined or self.footer.quarantine == list_digest(store, shard)

    def differences(self, identity: Identity) -> list[str]:
        """What makes this another recipe's or model's table: ``key: old → new``; empty if it is not."""

        def decisive(of: Identity | Footer) -> tuple[object, ...]:
            return of.recipe, of.models, of.corpora or {}

        if decisive(self.footer) == decisive(identity):  # of a hundred thousand tables nearly all are
            return []
        then, now = ({_said(k): v for k, v in (x.corpora or {}).items()} for x in (self.footer, identity))
        return [
            difference.arrow()
            for difference in (
                *differences(self.footer.recipe, identity.recipe),
                *differences(self.footer.models, identity.models, "weights of models"),
                *differences(then, now),
            )
        ]


def _said(corpus: str) -> str:
    return "rows of the shortlist" if corpus == SHORTLIST else f"files of {corpus}"


def open_table(store: Store, shard: Shard) -> Table | None:
    """The shard's score table, None if there is none. One that is foreign or short is a CorpusError."""
    table = find_table(store, shard)
    if table is None:
        return None
    rows, counts, total = table.file.rows, table.footer.rows, table.footer.input.rows
    if rows != counts.scored or total != counts.scored + counts.quarantined:
        raise CorpusError(
            f"{store.full(table.file.path)}: holds {rows} rows, but its footer counts {counts.scored} "
            f"scored and {counts.quarantined} quarantined of {total}; move it away"
        )
    return table


def find_table(store: Store, shard: Shard) -> Table | None:
    """The same, with as many rows as it may have."""
    path = table_path(shard)
    file = open_score_file(store, path)
    if file is None:
        return None
    try:
        footer = Footer.model_validate(file.metadata)
    except ValidationError as error:
        raise CorpusError(f"{store.full(path)}: its footer is not a score run's; move the file away") from error
    return Table(file, footer)


def canonical_hash(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    text = dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


@dataclass(frozen=True)
class Difference:
    """One place, by its dotted key, at which what a footer says is not what is expected."""

    key: str
    found: Any
    expected: Any

    def arrow(self) -> str:
        """For what has changed: ``key: old → new``."""
        return f"{self.key}: {_short(self.found)} → {_short(self.expected)}"

    def __str__(self) -> str:
        return f"{self.key} is {_short(self.found)}, expected {_short(self.expected)}"


def differences(found: Any, expected: Any, key: str = "", *, extra: bool = True) -> Iterator[Difference]:
    """Where two values of plain JSON differ. ``extra``: keys that only ``found`` has count, too."""
    if found == expected:
        return
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        for name in sorted({*expected, *(found if extra else ())}):
            below = f"{key}.{name}" if key else str(name)
            yield from differences(found.get(name), expected.get(name), below, extra=extra)
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for i, (before, after) in enumerate(zip(found, expected, strict=True)):
            yield from differences(before, after, f"{key}.{i}", extra=extra)
    else:
        yield Difference(key, found, expected)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    limit = 17 if text.startswith("sha256:") else 60
    return text if len(text) <= limit else f"{text[:limit]}…"
