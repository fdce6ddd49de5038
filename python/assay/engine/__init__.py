"""Running a recipe over a corpus: what the command line calls."""

from assay.engine.local import RunSummary, run
from assay.engine.plan import Plan, make_plan
from assay.engine.workshop import Workshop, open_encoder, open_workshop

__all__ = ["Plan", "RunSummary", "Workshop", "make_plan", "open_encoder", "open_workshop", "run"]
