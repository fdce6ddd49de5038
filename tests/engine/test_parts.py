"""What the parts of a shard say of their source."""

from __future__ import annotations

import pytest

from assay.corpus.errors import ShardError
from assay.corpus.storage import Fingerprint
from assay.engine.parts import _same_source
from assay.engine.shard import Source

SHARD, ONE, OTHER = (Fingerprint(size, mtime_ns=1) for size in (9, 1, 2))


def test_the_parts_files_are_the_shards() -> None:
    parts = [Source(SHARD, {"a": ONE, "b": None}), Source(SHARD, {"c": OTHER, "a": ONE})]
    assert _same_source(parts) == Source(SHARD, {"a": ONE, "b": None, "c": OTHER})


@pytest.mark.parametrize("second", [Source(ONE), Source(SHARD, {"a": OTHER}), Source(SHARD, {"b": ONE})])
def test_parts_of_two_states_are_no_shard(second: Source) -> None:
    with pytest.raises(ShardError, match="changed while it was being scored"):
        _same_source([Source(SHARD, {"a": ONE, "b": None}), second])
