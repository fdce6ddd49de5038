"""Fixtures of the ops' tests."""

from __future__ import annotations

from typing import Any

import pytest

from assay.ops import _backend


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that ops took, in the order of their calls."""
    backends: list[str] = []
    choose = _backend.choose

    def remember(*arguments: Any) -> str:
        backends.append(choose(*arguments))
        return backends[-1]

    monkeypatch.setattr(_backend, "choose", remember)
    return backends
