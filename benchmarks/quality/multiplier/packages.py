"""A second mixture, that no setting was chosen on: what installed packages are made of.

The target domain is type stubs (``.pyi``): declarations without bodies. The pool has sources that look much like them,
with annotations but with bodies, docstrings of the same packages, their tests, sources in C++, CUDA, Cython and
Fortran, prose and data.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from benchmarks.quality.multiplier.corpus import Mixture, apart

STUB = "stub"
SHARES = {STUB: 8, "source": 26, "docstring": 20, "test": 14, "native": 12, "prose": 10, "data": 10}
SUFFIXES = {
    ".pyi": STUB,
    ".py": "source",
    **dict.fromkeys((".cpp", ".cu", ".cuh", ".pyx", ".pxd", ".f90"), "native"),
    **dict.fromkeys((".rst", ".md", ".txt"), "prose"),
    **dict.fromkeys((".csv", ".json", ".yaml", ".svg"), "data"),
}
FILES, BYTES = 500, 1 << 20  # of a kind, and of a file


def texts() -> Iterator[tuple[str, str]]:
    """The kind and the text of some files of each kind; a hash of their paths says which: not the first packages'."""
    for kind, paths in _paths().items():
        for path in paths:
            text = path.read_text(encoding="utf-8", errors="replace")
            if kind == "source":
                docstrings, text = apart(text)
                yield "docstring", docstrings
            yield kind, text


def _paths() -> dict[str, list[Path]]:
    root = Path(sysconfig.get_path("purelib"))
    found: dict[str, dict[bytes, Path]] = {}
    for path in root.rglob("*"):
        inside = path.relative_to(root)
        kind = SUFFIXES.get(path.suffix)
        if kind == "source" and {"test", "tests", "testing"} & set(inside.parts):
            kind = "test"
        if kind is not None and path.is_file() and path.stat().st_size <= BYTES:
            found.setdefault(kind, {})[hashlib.blake2b(inside.as_posix().encode()).digest()] = path
    return {kind: [paths[key] for key in sorted(paths)[:FILES]] for kind, paths in found.items()}


PACKAGES = Mixture(STUB, SHARES, texts)
