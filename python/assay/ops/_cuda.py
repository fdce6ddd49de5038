"""The CUDA library: loaded when first used, absent from builds without nvcc."""

from __future__ import annotations


def missing() -> str | None:
    """Why CUDA kernels cannot run here, and what to do; None if they can."""
    return "this build has no CUDA library; install assay where nvcc is, with -C cmake.define.ASSAY_CUDA=ON"
