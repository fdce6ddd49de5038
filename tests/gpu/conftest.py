"""Everything here needs an NVIDIA GPU, or a rehearsal on the CPU (docs/gpu.md).

Under ``make gpu`` a process runs the tests that it is told, one by one (tests.gpu.worker); else pytest runs as ever.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import pytest
import torch

from tests.gpu import worker
from tests.gpu.harness import needs_memory
from tests.gpu.settings import REHEARSAL

SELECT = "GPU_TESTS"  # "small", or "gigabytes": the tests that call needs_memory, which run alone
TRACEBACK = 4000  # characters of it in a failed test's outcome


def pytest_runtest_setup() -> None:
    if not (REHEARSAL or torch.cuda.is_available()):
        pytest.skip("no CUDA device; `make gpu` runs these tests where there is one")  # from here: one line for all


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu") if REHEARSAL else torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """For tests of the CUDA machinery itself, which a rehearsal cannot show."""
    if device.type != "cuda":
        pytest.skip("a rehearsal has no CUDA device")
    return device


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """The supervisor's order, where there is one."""
    if worker.REPLY not in os.environ:
        return None
    alone = os.environ[SELECT] == "gigabytes"
    items = [item for item in session.items if takes_gigabytes(item) == alone]
    rows: dict[str, Callable[[], worker.End]] = {item.nodeid: partial(run, item) for item in items}
    worker.serve("test", rows)
    return True


def takes_gigabytes(item: pytest.Item) -> bool:
    return needs_memory.__name__ in getattr(item, "function").__code__.co_names  # noqa: B009 (a Function has it)


def run(item: pytest.Item) -> worker.End:
    reports: list[pytest.TestReport] = []

    class Ear:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            reports.append(report)

    ear = Ear()
    item.config.pluginmanager.register(ear)
    try:
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
    finally:
        item.config.pluginmanager.unregister(ear)
        if not REHEARSAL:
            torch.cuda.empty_cache()  # other processes share the card
    return end(reports)


def end(reports: list[pytest.TestReport]) -> worker.End:
    for report in reports:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = " ".join(str(crash.message if crash else report.longrepr).split())
            return worker.End("failed", text[:400], {"traceback": report.longreprtext[-TRACEBACK:]})
    for report in reports:
        if report.skipped:
            return worker.End("skipped", str(report.longrepr[2] if isinstance(report.longrepr, tuple) else ""))
    return worker.OK
