"""Optional dependencies: imported where they are first used, with an error that says what to install."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or raise ImportError naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # the module is there; something it imports is not
        raise ImportError(f"{module} is not installed; it comes with `pip install 'assay[{extra}]'`") from error
