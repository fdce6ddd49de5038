"""Running a recipe over a corpus: what the command line calls."""

from assay.engine.devices import find_devices
from assay.engine.local import RunSummary, run
from assay.engine.plan import Plan, make_plan
from assay.engine.reranking import check_recipe, next_plan
from assay.engine.workshop import Workshop, open_encoder, open_workshop

__all__ = [
    "Plan",
    "RunSummary",
    "Workshop",
    "check_recipe",
    "find_devices",
    "make_plan",
    "next_plan",
    "open_encoder",
    "open_workshop",
    "run",
]
