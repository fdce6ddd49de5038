"""Every test of a kernel runs on poisoned scratch memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.scratch import poisoned


@pytest.fixture(autouse=True)
def _poisoned_scratch() -> Iterator[None]:
    with poisoned():
        yield
