"""What `assay prove` has found of a folder's scores, and who asks it before rows are chosen."""

from __future__ import annotations

import hashlib
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict

from assay._json import dumps
from assay.corpus.errors import CorpusError
from assay.corpus.footer import canonical_hash
from assay.corpus.layout import table_path
from assay.corpus.score_files import score_field, stream_score
from assay.corpus.scores_folder import Scores, open_scores
from assay.corpus.storage import Store

PROOF = "proof.json"
End = Literal["high", "low"]
RANDOM = "random"
"""The control that every score has: as many random rows."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Gain(_Part):
    """How far the held-out loss lies below a control's: Hodges–Lehmann's estimate and Wilcoxon's interval of 95 %."""

    estimate: float
    low: float
    high: float


class Claim(_Part):
    """The gains over its controls of the end of a score that was kept, and whether the one over random rows is surely
    above 0. ``values``: which numbers the score had, as `values_digest` has them."""

    proved: bool
    keep: End
    values: str
    gains: dict[str, Gain]

    @property
    def beaten(self) -> list[str]:
        """The controls that it is surely better than."""
        return [control for control, gain in self.gains.items() if gain.low > 0]

    @property
    def better(self) -> list[str]:
        """The controls that are surely better than it."""
        return [control for control, gain in self.gains.items() if gain.high < 0]


class Proof(_Part):
    """The file.

    Attributes:
        scores: whose scores these are: `scores_digest`.
        losses: by score, the held-out loss after each training.
        basis: what was trained, and how.
    """

    scores: str
    claims: dict[str, Claim]
    losses: dict[str, list[float]]
    basis: dict[str, Any]


def scores_digest(scores: Scores) -> str:
    """Changes with whatever decides a folder's scores, with any shard, and with its counts."""
    digest = hashlib.sha256(canonical_hash(_identity(scores)).encode())
    for status in scores.shards:
        table = status.table
        facts = None if table is None else [table.input.to_json(), table.rows, table.scored, table.quarantined]
        digest.update(dumps([status.shard.path, facts], sort_keys=True).encode())
    return f"sha256:{digest.hexdigest()}"


def _identity(scores: Scores) -> dict[str, Any]:
    own = scores.identity
    return {"recipe": own.recipe, "models": own.models, "corpora": own.corpora}


def values_digest(scores: Scores, name: str) -> str:
    """Changes with any of a score's numbers. A CorpusError unless it is one number per row."""
    digest = hashlib.sha256()
    for status in scores.shards:
        if status.table is not None:
            for part in stream_score(scores.store, table_path(status.shard), name):
                digest.update(part.tobytes())
    return f"sha256:{digest.hexdigest()}"


def end_of(scores: Scores, name: str, keep: str | None) -> End | None:
    """Which end of a score is kept: ``keep``, or what its tables say; None if those do not."""
    shard = next(status.shard for status in scores.shards if status.table is not None)
    stored = score_field(scores.store, table_path(shard), name).metadata or {}
    end = keep or stored.get(b"keep", b"").decode()
    return cast("End", end) if end in ("high", "low") else None


def check_proof(
    folder: str, scores_url: str, by: str | None, corpus_path: str | None = None, keep: str | None = None
) -> None:
    """CorpusError unless ``assay prove`` has found, of these very scores and this end of ``by``, that it is better than
    random rows."""
    store, option = Store.at(folder), f"--proved {folder}"
    if by is None:
        raise CorpusError(f"{option}: a proof is of one score; choose by it, with --by and a rule such as --top")
    try:
        proof = Proof.model_validate_json(store.read_text(PROOF))
    except FileNotFoundError as error:
        raise CorpusError(f"{option}: no {PROOF}; expected a folder of `assay prove`") from error
    except ValueError as error:
        raise CorpusError(f"{option}: {store.full(PROOF)} is not what `assay prove` writes") from error
    claim = proof.claims.get(by)
    if claim is None:
        raise CorpusError(f"{option}: tells of {', '.join(proof.claims)}, not of {by}; prove it, or select by those")
    scores = open_scores(scores_url, corpus_path)
    if proof.scores != scores_digest(scores) or claim.values != values_digest(scores, by):
        raise CorpusError(f"{option}: is about other scores than {scores_url} has now; prove them again")
    if claim.keep != (end := end_of(scores, by, keep)):
        other = f"not of its {end} one" if end else f"and the score names none; add --keep {claim.keep}"
        raise CorpusError(f"{option}: tells of {by}'s {claim.keep} end, {other}")
    if not claim.proved:
        gain = claim.gains[RANDOM]
        raise CorpusError(
            f"{option}: {by} is not better than random rows (held-out loss lower by {gain.estimate:.4g}, 95 %: "
            f"{gain.low:.4g} to {gain.high:.4g}); select by another score, or leave out --proved"
        )
