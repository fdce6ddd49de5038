"""Shared fixtures."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of a kernel
    from tests import interpreter

    interpreter.install()

from assay import _native

if TYPE_CHECKING:  # it needs more than the tests on a GPU do
    from tests.small_project import Project

USABLE_ISAS = [name for name, supported in _native.instruction_sets() if supported]
ALL_ISAS = [name for name, _ in _native.instruction_sets()]


@pytest.fixture(params=ALL_ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set of this build in turn, forced."""
    name: str = request.param
    if name not in USABLE_ISAS:
        pytest.skip(f"this processor does not run {name}")
    monkeypatch.setenv("ASSAY_ISA", name)
    return name


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A corpus, models and a recipe on disk."""
    from tests.small_project import make_project

    return make_project(tmp_path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is slow has longer to end, for machines are shared."""
    if config.pluginmanager.has_plugin("timeout"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.timeout(1200))


_LOG = logging.getLogger("assay")
_LOG_AS_IMPORTED = (_LOG.level, list(_LOG.handlers), _LOG.propagate)


@pytest.fixture(autouse=True)
def _log_as_imported() -> Iterator[None]:
    """The command sets assay's log up for its process, which here is every later test's: also where a module's
    fixture has called it, before any fixture of a test."""

    def restore() -> None:
        level, handlers, _LOG.propagate = _LOG_AS_IMPORTED
        _LOG.setLevel(level)
        _LOG.handlers[:] = handlers

    restore()
    yield
    restore()


@pytest.fixture(autouse=True)
def _shortcut_as_it_was() -> Iterator[None]:
    """What a test leaves switched off for its process is every later test's."""
    before = torch.backends.mha.get_fastpath_enabled()
    yield
    after = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(before)
    assert after == before, "the test left attention without torch's shortcut"


@pytest.fixture(autouse=True, scope="module")
def _memory_is_empty() -> Iterator[None]:
    """Of what a module leaves in fsspec's file system of one process, the next finds nothing."""
    yield
    if "fsspec.implementations.memory" in sys.modules:
        memory = sys.modules["fsspec.implementations.memory"].MemoryFileSystem
        memory.store.clear()
        memory.pseudo_dirs[:] = [""]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
