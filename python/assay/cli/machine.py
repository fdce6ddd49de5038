"""`assay doctor`."""

from __future__ import annotations

import os

import assay
from assay.cli.terminal import INCOMPLETE, OK, say

_OPTIONAL = ("numpy", "pyarrow", "pydantic", "fsspec", "zstandard", "scikit-learn", "transformers", "gguf")


def doctor() -> int:
    """Print what is installed, which kernels were built and which of them this processor runs."""
    import platform

    import torch

    lines = {
        "assay": assay.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "cuda": torch.version.cuda or "torch is built without it",
    }
    try:
        lines |= {key: str(value) for key, value in assay.ops.build_info().items()}
        code = OK
    except (ImportError, AttributeError, OSError) as error:
        lines["native"] = f"not available: {error}"
        code = INCOMPLETE
    lines |= {package: _installed(package) for package in _OPTIONAL}
    for key, value in lines.items():
        say(f"{key:18} {value}")
    return code


def _installed(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
