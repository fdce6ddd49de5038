"""Calls of libraries on strangers' files."""

from __future__ import annotations

import resource

import pytest

from assay.recipe.library_calls import bounded_memory


def test_memory_is_bounded_for_as_long_as_it_lasts():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with bounded_memory(1 << 26):
        assert len(bytearray(1 << 20)) == 1 << 20
        with pytest.raises(MemoryError):
            bytearray(1 << 30)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(bytearray(1 << 28)) == 1 << 28
