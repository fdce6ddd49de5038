"""The manifest that a selection has written."""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, Field

from assay.corpus.errors import CorpusError
from assay.corpus.layout import MANIFEST
from assay.corpus.storage import Store, may_pass


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class SelectedShard(_Part):
    path: str
    table_sha256: str


class Group(_Part):
    column: str


class Where(_Part):
    condition: str


class With(_Part):
    """Another run's scores, or a selection, and the digests of its tables by their paths."""

    scores: str | None = None
    selection: str | None = None
    table_sha256: dict[str, str] = {}


class SelectionManifest(_Part):
    """What is read of it."""

    rule: str
    by: str
    threshold: float | None = None
    facts: dict[str, float] = {}
    group: Group | None = None
    where: Where | None = None
    beside: dict[str, With] = Field(default={}, alias="with")
    shards: list[SelectedShard]


def read_selection(store: Store, option: str) -> SelectionManifest:
    """The manifest of a folder that ``option`` names. A CorpusError if no selection has written it."""
    try:
        return SelectionManifest.model_validate_json(store.read_text(MANIFEST))
    except FileNotFoundError as error:
        raise CorpusError(f"{option}: no {MANIFEST}; expected a folder of `assay select`") from error
    except ValueError as error:
        raise CorpusError(f"{option}: {store.full(MANIFEST)}: not a manifest of `assay select`") from error


def is_selection(store: Store) -> bool:
    """Whether a folder's manifest is a selection's, and not that of a run or of somebody else."""
    try:
        manifest = json.loads(store.read_text(MANIFEST))
    except (OSError, ValueError, RecursionError) as error:
        if may_pass(error):
            raise
        return False
    return isinstance(manifest, dict) and {"rule", "by", "scores"} <= manifest.keys()
