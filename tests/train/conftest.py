"""Shared fixtures."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def quick_collections() -> Iterator[None]:
    """Accelerate collects garbage in every run, most of a second with all the modules that the tests have loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
