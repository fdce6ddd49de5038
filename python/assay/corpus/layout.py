"""Where things lie in a scores folder and in a curated corpus, relative to it."""

from __future__ import annotations

from assay.corpus.shards import MANIFEST, Shard

RESOLVED_RECIPE = "recipe.resolved.yaml"
# What the parts of fits gave, while a run goes on.
FITS = ".fit"
# Parts of large shards that wait to be joined, on an object store.
PARTS = ".parts"
RETRIEVAL = "_retrieval"
"""Where a recipe with a shortlist has what chose it: a scores folder of its own. No shard lies in such a folder, whose
name is a hidden one."""

__all__ = [
    "FITS",
    "MANIFEST",
    "PARTS",
    "RESOLVED_RECIPE",
    "RETRIEVAL",
    "features_path",
    "files_path",
    "quarantine_path",
    "selection_path",
    "table_path",
]


def table_path(shard: Shard) -> str:
    """A shard's score table."""
    return f"{shard.stem}.parquet"


def quarantine_path(shard: Shard) -> str:
    """The list of its rows that were not scored; there is none if all were."""
    return f"quarantine/{shard.stem}.jsonl"


def files_path(shard: Shard) -> str:
    """The list of the files that its rows name, as they were when they were read; there is none if they name none."""
    return f"files/{shard.stem}.jsonl"


def features_path(method: str, checkpoint: int, shard: Shard) -> str:
    """The features of it that a method keeps."""
    return f"features/{method}/{checkpoint}/{shard.stem}.arrow"


def selection_path(shard: Shard) -> str:
    """What a selection made of each of its rows, beside the curated shard."""
    return f"_selection/{table_path(shard)}"
