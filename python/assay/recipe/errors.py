"""Errors that stop a run before it does anything wrong. Each is one line that says where and what to do."""

from __future__ import annotations


class EngineError(ValueError):
    """The run cannot go on, or must not."""


class RecipeError(EngineError):
    """Something in a recipe is wrong. Reads ``<file>: <dotted key>: <what>``."""

    def __init__(self, source: str, key: str, message: str) -> None:
        super().__init__(": ".join(part for part in (source, key, message) if part))


class ChangedError(EngineError):
    """Score tables are there already, made by another recipe or model."""
