"""What can go wrong with a corpus, from the whole of it down to one row."""

from __future__ import annotations


class CorpusError(ValueError):
    """The corpus or an output folder cannot be used as asked: the run stops before any work is lost."""


class ShardError(ValueError):
    """One shard cannot be read: it is quarantined and the run goes on."""


class BadRow(ValueError):
    """One row cannot be scored: it is quarantined and the run goes on."""
