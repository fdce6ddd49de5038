"""What this build of assay holds, and what the machine runs of it."""

from __future__ import annotations

import platform
from typing import Any

import torch

from assay import _native
from assay.ops import _cuda
from assay.ops._native import isa, threads


def build_info() -> dict[str, Any]:
    """What this build holds and what this processor runs: the facts that ``assay doctor`` prints."""
    sets = _native.instruction_sets()
    return {
        "machine": platform.machine(),
        "instruction_sets": {name: "usable" if supported else "not on this processor" for name, supported in sets},
        "isa": isa() or [name for name, supported in sets if supported][-1],
        "threads": threads(),
        "torch": torch.__version__,
        "cuda_kernels": _cuda.build_info(),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
