"""The commit that changed kernels are measured against: packed beforehand, since a lent machine may have no git.

``GPU_BASELINE=COMMIT python -m tests.gpu baseline`` (``make gpu-baseline``) packs it into gpu-baseline.tar in the root
of the repository, which travels with the working tree; where there is git, a run with GPU_BASELINE packs it itself.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

from tests.gpu.settings import ROOT

VARIABLE = "GPU_BASELINE"
ARCHIVE = ROOT / "gpu-baseline.tar"
SOURCE = ROOT / "build" / "gpu-baseline"
CONTENT = ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "csrc", "kernels", "python")
# Which ops a file that differs may change; one that is nowhere here may change all of them.
FILES = {
    "csrc/cuda/ensemble*": ("ensemble_stats",),
    "csrc/cuda/crew*": ("ensemble_stats",),
    "csrc/cuda/[!ces]*": ("ensemble_stats", "project"),
    "python/assay/ops/ensemble.py": ("ensemble_stats",),
    "*/*head*": ("linear_ensemble_stats", "head_scores", "linear_cross_entropy"),
    "kernels/fields.py": ("linear_ensemble_stats", "head_scores"),
    "*/*dot.py": ("grad_dot",),
    "*/*sqnorm.py": ("grad_sqnorm",),
    "*/*scan.py": ("topk_scan",),
    "*/project*.py": ("project",),
    "*/*rademacher*.py": ("project",),
    "*/*sparse*": ("project",),
    "kernels/sketch*.py": ("grad_sketch",),
    "kernels/sketch_rows.py": ("project",),
    "python/assay/ops/layer_sketch.py": ("grad_sketch",),
    "kernels/philox.py": ("grad_sketch", "project", "head_scores"),
    "python/assay/ops/sketch.py": ("grad_sketch", "project", "head_scores"),
    "kernels/slices.py": ("grad_sketch", "project", "grad_dot", "grad_sqnorm"),
}
ALL = tuple(sorted({op for ops in FILES.values() for op in ops}))


def pack(commit: str) -> Path:
    """``commit``'s sources into gpu-baseline.tar. RuntimeError with git's words where there is no such commit."""
    if not commit:
        raise RuntimeError(f"name the commit to measure against: {VARIABLE}=COMMIT")
    words = ["git", "archive", "--format=tar", f"--output={ARCHIVE}", commit, *CONTENT]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        ARCHIVE.unlink(missing_ok=True)
        raise RuntimeError(f"{VARIABLE}={commit}: {done.stderr.strip() or 'git failed'}")
    return ARCHIVE


def unpack() -> Path | None:
    """The baseline's sources, or None where none is given. A commit that cannot be had is an error."""
    commit = os.environ.get(VARIABLE)
    if commit and not ARCHIVE.exists():
        if shutil.which("git") is None or not (ROOT / ".git").exists():
            raise RuntimeError(
                f"{VARIABLE}={commit}: no git here to take it from; pack it where there is: "
                f"make gpu-baseline {VARIABLE}={commit}"
            )
        pack(commit)
    shutil.rmtree(SOURCE, ignore_errors=True)
    if not ARCHIVE.exists():
        return None
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(SOURCE, filter="data")
    return SOURCE


def name() -> str:
    """The packed commit, as git notes it in its archives."""
    if not ARCHIVE.exists():
        return "none"
    with tarfile.open(ARCHIVE) as archive:
        return archive.pax_headers.get("comment", "unknown")[:12]


def changed_ops() -> list[str]:
    """The ops that a difference between the baseline's kernels and this tree's may change."""
    found: set[str] = set()
    if SOURCE.exists():
        for folder in ("kernels", "csrc/cuda", "python/assay/ops"):
            for path in _differing(folder):
                matching = [ops for pattern, ops in FILES.items() if fnmatch.fnmatch(path, pattern)]
                found.update(*(matching or [ALL]))
    return sorted(found)


def _differing(folder: str) -> list[str]:
    def content(root: Path) -> dict[str, bytes]:
        files = (path for path in (root / folder).rglob("*") if path.suffix in (".py", ".cu", ".cuh", ".h"))
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}

    old, new = content(SOURCE), content(ROOT)
    return sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))
