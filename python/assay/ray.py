"""Scoring inside pipelines of one's own, in Ray Data and wherever else Arrow tables go through a function."""

from assay.engine.arrow_scorer import FAULT, Scorer

__all__ = ["FAULT", "Scorer"]
