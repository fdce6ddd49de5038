"""Everything here needs an NVIDIA GPU, or a rehearsal on the CPU (docs/gpu.md)."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.harness import REHEARSAL


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
