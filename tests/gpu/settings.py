"""Where a run is and how long it may take. Nothing here needs torch: the process that supervises has no GPU context."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "gpu-site"  # where the package is installed: nothing is left in the environment
BASELINE_SITE = ROOT / "build" / "gpu-baseline-site"
LOGS = ROOT / "build" / "gpu-logs"  # what processes print; a table has the ends of what matters
# ASSAY_GPU_TESTS_ON=cpu runs the same lines at reduced sizes on the CPU's kernels: a rehearsal of the run itself.
REHEARSAL = os.environ.get("ASSAY_GPU_TESTS_ON") == "cpu"


def environment(site: Path = SITE, **more: str) -> dict[str, str]:
    """For processes that test or measure what was built into ``site``."""
    path = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", **more}
